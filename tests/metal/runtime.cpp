// Runs kernels that were compiled against shim.h: every Metal thread is a fiber of one OS
// thread, and barriers and simdgroup functions are the places where fibers meet. A kernel that
// was compiled with clang's ThreadSanitizer calls the functions at the end of this file at each
// access to memory (the sanitizer's own library is not linked), which check it.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "interface.h"

typedef unsigned char byte;

// As in emulator.py.
struct Argument {
  const char* name;
  byte* data;  // copied in unless it is an output without initial value, copied out if it is one
  size_t bytes;
  uint element;  // bytes
  int output, initialised;
};
struct Launch {
  void (*kernel)(void** buffers, const emu_attributes*);
  const Argument* arguments;
  uint argument_count, grid[3], threadgroup[3], schedule, poison, checked;
  double seconds;
  char finding[1024];
  int line;         // of the finding in the kernel, or 0, and then
  size_t instruction;  // its offset in the kernel's library, or 0
};

namespace {

constexpr uint MAX_THREADS = 1024, SIMD = 32, MAX_BUFFERS = 64, THREADGROUP_BYTES = 32768;
constexpr size_t PAGE = 4096, STACK = 32 * PAGE;
// Buffers stand this far apart, so that an index gone wrong by 32 bits hits no other buffer.
constexpr size_t DISTANCE = size_t(1) << 36;

Launch* launch;

// ---------------------------------------------------------------------- findings

sigjmp_buf end_of_launch;

[[noreturn]] void end_with(void* caller, int line, const char* format, va_list values) {
  vsnprintf(launch->finding, sizeof launch->finding, format, values);
  launch->line = line;
  Dl_info kernel, library;
  if (dladdr((void*)launch->kernel, &kernel) && dladdr(caller, &library) &&
      kernel.dli_fbase == library.dli_fbase)
    launch->instruction = (byte*)caller - (byte*)library.dli_fbase - 1;
  siglongjmp(end_of_launch, 1);
}
// `caller` is the address that the kernel would go on at.
[[noreturn]] void fail_at(void* caller, const char* format, ...) {
  va_list values;
  va_start(values, format);
  end_with(caller, 0, format, values);
}
[[noreturn]] void fail(int line, const char* format, ...) {
  va_list values;
  va_start(values, format);
  end_with(nullptr, line, format, values);
}

// ---------------------------------------------------------------------- threads

enum State { READY, SIMD_FUNCTION, SIMDGROUP_BARRIER, THREADGROUP_BARRIER, DONE };
const char* const STATES[] = {"is running", "waits at a simdgroup function",
                              "waits at a simdgroup barrier", "waits at a threadgroup barrier",
                              "has returned"};
struct Fiber {
  void* stack;
  State state;
  int line, column;
  uint fence;
  void* slot;
  emu_exchange* exchange;
  uint index;  // in the threadgroup
  emu_attributes attributes;

  bool meets(const Fiber& other) const {
    return state == other.state && line == other.line && column == other.column &&
           fence == other.fence && exchange == other.exchange;
  }
};
struct Simdgroup {
  Fiber* lanes;
  uint size, position, order[SIMD];
  uint fences[2];
};

Fiber fibers[MAX_THREADS];
Simdgroup simdgroups[MAX_THREADS / SIMD];
byte* stacks;
Fiber* current;
void* scheduler;  // its stack while a fiber runs
void* buffer_addresses[MAX_BUFFERS];
uint thread_count, threadgroup;  // of the threadgroup that runs, and its number in the grid

// The time of an access is the number of meetings before it. A fence orders what lies before
// it: accesses to its kind of memory (0 device, 1 threadgroup) at an earlier time.
uint now, fences[2];

void raise_fences(uint which, uint* of) {
  now++;
  if (which & EMU_FENCE_DEVICE) of[0] = now;
  if (which & EMU_FENCE_THREADGROUP) of[1] = now;
}

uint64_t random_state;
uint random_below(uint n) {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint(random_state >> 32) % n;
}
// 0 to n - 1 as the schedule wants it: 0 ascending, 1 descending, others random.
void arrange(uint* order, uint n) {
  for (uint i = 0; i < n; i++) order[i] = launch->schedule == 1 ? n - 1 - i : i;
  if (launch->schedule > 1)
    for (uint i = n; i > 1; i--) {
      uint j = random_below(i), other = order[j];
      order[j] = order[i - 1];
      order[i - 1] = other;
    }
}

// Leaves the running stack, whose place goes to *from, for another.
extern "C" void emu_switch(void** from, void* to);
asm(R"(
.globl emu_switch
emu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

Fiber* next_lane(Simdgroup& group) {
  while (group.position < group.size) {
    Fiber* lane = &group.lanes[group.order[group.position++]];
    if (lane->state == READY) return lane;
  }
  return nullptr;
}
// Straight to the next lane: the scheduler is needed once per meeting, not once per lane.
void leave() {
  Fiber* left = current;
  current = next_lane(simdgroups[left->index / SIMD]);
  emu_switch(&left->stack, current ? current->stack : scheduler);
}
void wait(State state, int line, int column, uint fence = 0) {
  current->state = state;
  current->line = line;
  current->column = column;
  current->fence = fence;
  leave();
}
void fiber_main() {
  launch->kernel(buffer_addresses, &current->attributes);
  wait(DONE, 0, 0);
}
void start(Fiber& fiber) {
  // Different cache lines at the top, or the stacks of all lanes would compete for the same.
  byte* top = stacks + (fiber.index + 1) * STACK - fiber.index % 64 * 64;
  void** stack = (void**)top - 8;
  memset(stack, 0, 8 * sizeof(void*));
  stack[6] = (void*)fiber_main;
  fiber.stack = stack;
  fiber.state = READY;
  fiber.exchange = nullptr;
}

[[noreturn]] void diverged(const char* what, const Fiber& a, const Fiber& b) {
  const Fiber& waiting = a.state == DONE ? b : a;
  const Fiber& other = a.state == DONE ? a : b;
  char where[32] = "";
  if (other.state != DONE) snprintf(where, sizeof where, " in line %d", other.line);
  fail(waiting.line, "divergence: %s is not reached by all threads: thread %u of threadgroup %u "
       "%s, but thread %u %s%s", what, waiting.index, threadgroup, STATES[waiting.state],
       other.index, STATES[other.state], where);
}

// Runs a simdgroup until its lanes meet; false if they have to wait for other simdgroups.
bool advance(Simdgroup& group) {
  if (launch->schedule > 1) arrange(group.order, group.size);
  group.position = 0;
  current = next_lane(group);
  if (current) emu_switch(&scheduler, current->stack);

  void* slots[SIMD];
  uint active = 0;
  Fiber* first = nullptr;
  for (uint i = 0; i < group.size; i++) {
    Fiber& lane = group.lanes[i];
    if (lane.state == DONE) continue;
    if (!first) first = &lane;
    if (!lane.meets(*first)) diverged("a meeting of the simdgroup", *first, lane);
    slots[i] = lane.slot;
    active |= 1u << i;
  }
  if (!first || first->state == THREADGROUP_BARRIER) return false;
  if (first->state == SIMD_FUNCTION) {
    current = first;  // whom undefined results are reported of
    first->exchange(slots, active);
  }
  raise_fences(first->fence, group.fences);
  for (uint i = 0; i < group.size; i++)
    if (active >> i & 1) group.lanes[i].state = READY;
  return true;
}

void run_threadgroup() {
  uint groups = (thread_count + SIMD - 1) / SIMD;
  raise_fences(EMU_FENCE_DEVICE | EMU_FENCE_THREADGROUP, fences);
  for (uint i = 0; i < groups; i++) {
    Simdgroup& group = simdgroups[i];
    group.lanes = fibers + i * SIMD;
    group.size = thread_count - i * SIMD < SIMD ? thread_count - i * SIMD : SIMD;
    group.fences[0] = group.fences[1] = 0;
    arrange(group.order, group.size);
  }
  for (uint i = 0; i < thread_count; i++) start(fibers[i]);
  for (;;) {
    uint pending[MAX_THREADS / SIMD], left = groups;
    arrange(pending, groups);
    if (launch->schedule == 1 || launch->schedule == 0)
      for (uint i = 0; i < groups; i++) while (advance(simdgroups[pending[i]])) {}
    else  // simdgroups take turns at random
      while (left) {
        uint i = random_below(left);
        if (!advance(simdgroups[pending[i]])) pending[i] = pending[--left];
      }
    for (uint i = 1; i < thread_count; i++)
      if (fibers[i].state != fibers[0].state ||
          (fibers[0].state != DONE && !fibers[i].meets(fibers[0])))
        diverged("a threadgroup barrier", fibers[0], fibers[i]);
    if (fibers[0].state == DONE) return;
    raise_fences(fibers[0].fence, fences);
    for (uint i = 0; i < thread_count; i++) fibers[i].state = READY;
  }
}

// ---------------------------------------------------------------------- memory

constexpr uint HOST = ~0u;  // wrote the initial values

// The last accesses to a few bytes; threads are numbered from 1 through the whole grid.
struct Cell {
  uint writer, write_time, readers[2], read_times[2];
};
struct Buffer {
  const char* name;
  byte *base, *pages;
  size_t bytes, page_bytes;
  uint element, granule;  // bytes; a cell stands for `granule` of them
  bool read_only, shared;
  uint threadgroup;  // that a shared variable was last poisoned for
  Cell* cells;
};

byte* arena;
Buffer buffers[MAX_BUFFERS];
uint buffer_count, argument_count;

size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

void poison(byte* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) memory[i] = byte(launch->poison >> 8 * (i % 4));
}

Buffer& add_buffer(uint number, const char* name, size_t bytes, uint element) {
  if (number >= MAX_BUFFERS) fail(0, "limit: more than %u buffers", MAX_BUFFERS);
  if (buffer_count <= number) buffer_count = number + 1;
  Buffer& buffer = buffers[number];
  buffer.name = name;
  buffer.bytes = bytes;
  buffer.element = element;
  buffer.granule = element < 4 ? element : 4;
  buffer.page_bytes = rounded_up(bytes + !bytes, PAGE);
  buffer.pages = arena + DISTANCE * number + DISTANCE / 2;
  if (mprotect(buffer.pages, buffer.page_bytes, PROT_READ | PROT_WRITE))
    fail(0, "no memory for %zu bytes of %s", bytes, name);
  // Without checks, the page behind the end is what notices a step too far.
  size_t slack = launch->checked ? 0 : buffer.page_bytes - rounded_up(bytes, 16);
  buffer.base = buffer.pages + slack;
  return buffer;
}
void give_cells(Buffer& buffer, uint writer) {
  if (!launch->checked) return;
  size_t count = buffer.bytes / buffer.granule;
  buffer.cells = (Cell*)calloc(count + 1, sizeof(Cell));
  if (writer) for (size_t i = 0; i < count; i++) buffer.cells[i].writer = writer;
}
void refine(Buffer& buffer, uint granule) {
  Cell* coarse = buffer.cells;
  uint parts = buffer.granule / granule;
  buffer.granule = granule;
  give_cells(buffer, 0);
  for (size_t i = 0; i < buffer.bytes / granule; i++) buffer.cells[i] = coarse[i / parts];
  free(coarse);
}

// "name[index]", of an address in or near a buffer.
const char* place(const byte* address) {
  static char text[160];
  size_t number = size_t(address - arena) / DISTANCE;
  if (number >= buffer_count || !buffers[number].pages)
    snprintf(text, sizeof text, "%p", (const void*)address);
  else {
    const Buffer& buffer = buffers[number];
    long bytes = address - buffer.base, element = buffer.element;
    long index = bytes >= 0 ? bytes / element : -((element - 1 - bytes) / element);
    snprintf(text, sizeof text, "%s[%ld] (of %zu elements)", buffer.name, index,
             buffer.bytes / buffer.element);
  }
  return text;
}

bool ordered(uint thread, uint time, bool shared) {
  uint me = threadgroup * MAX_THREADS + current->index + 1;
  if (thread == 0 || thread == me || thread == HOST) return true;
  if ((thread - 1) / MAX_THREADS != threadgroup) return false;
  if (time < fences[shared]) return true;
  uint index = (thread - 1) % MAX_THREADS;
  return index / SIMD == current->index / SIMD &&
         time < simdgroups[index / SIMD].fences[shared];
}
[[noreturn]] void race(const char* what, uint other, const byte* address, void* caller) {
  uint index = (other - 1) % MAX_THREADS, group = (other - 1) / MAX_THREADS;
  fail_at(caller, "race: %s %s by thread %u of threadgroup %u and thread %u of threadgroup %u "
          "without a barrier between", what, place(address), index, group, current->index,
          threadgroup);
}
void check_cell(Buffer& buffer, Cell& cell, byte* address, bool write, void* caller) {
  uint me = threadgroup * MAX_THREADS + current->index + 1;
  // What an earlier threadgroup left in its memory is gone.
  if (buffer.shared && cell.writer && (cell.writer - 1) / MAX_THREADS != threadgroup)
    cell = Cell();
  if (!write && !cell.writer)
    fail_at(caller, "uninitialised: thread %u of threadgroup %u reads %s", current->index,
            threadgroup, place(address));
  if (!ordered(cell.writer, cell.write_time, buffer.shared))
    race(write ? "two writes to" : "a write and then a read of", cell.writer, address, caller);
  if (!write) {
    if (cell.readers[0] != me) {
      cell.readers[1] = cell.readers[0];
      cell.read_times[1] = cell.read_times[0];
    }
    cell.readers[0] = me;
    cell.read_times[0] = now;
    return;
  }
  for (int i = 0; i < 2; i++)
    if (!ordered(cell.readers[i], cell.read_times[i], buffer.shared))
      race("a read and then a write of", cell.readers[i], address, caller);
  cell = Cell();
  cell.writer = me;
  cell.write_time = now;
}
void check(void* at, size_t bytes, bool write, uint alignment, void* caller) {
  byte* address = (byte*)at;
  if (size_t(address - stacks) < MAX_THREADS * STACK) return;
  size_t number = size_t(address - arena) / DISTANCE;
  const char* access = write ? "writes" : "reads";
  if (number >= buffer_count) {
    Dl_info library;
    if (!write && dladdr(at, &library)) return;  // a table of the kernel's own
    fail_at(caller, "out of bounds: thread %u of threadgroup %u %s %s", current->index,
            threadgroup, access, place(address));
  }
  Buffer& buffer = buffers[number];
  size_t offset = address - buffer.base;
  if (offset + bytes > buffer.bytes || offset > buffer.bytes || (write && buffer.read_only))
    fail_at(caller, "out of bounds: thread %u of threadgroup %u %s %zu bytes at %s",
            current->index, threadgroup, access, bytes, place(address));
  if (size_t(address) % alignment)
    fail_at(caller, "misaligned: thread %u of threadgroup %u %s %zu bytes at %s",
            current->index, threadgroup, access, bytes, place(address));
  if (!buffer.cells) return;
  while ((offset | bytes) % buffer.granule) refine(buffer, buffer.granule / 2);
  for (size_t done = 0; done < bytes; done += buffer.granule)
    check_cell(buffer, buffer.cells[(offset + done) / buffer.granule], address + done, write,
               caller);
}

// ---------------------------------------------------------------------- launches

void on_signal(int signal, siginfo_t* info, void* context) {
  if (!launch) {
    ::signal(signal, SIG_DFL);
    return;
  }
  uint thread = current ? current->index : 0;
  void* after = (void*)(((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1);
  if (signal == SIGXCPU)
    fail_at(after, "hang: threadgroup %u has not come to its end in %g s; thread %u %s",
            threadgroup, launch->seconds, thread, STATES[fibers[thread].state]);
  if (signal != SIGSEGV && signal != SIGBUS)
    fail_at(after, "undefined: thread %u of threadgroup %u: %s", thread, threadgroup,
            strsignal(signal));
  byte* address = (byte*)info->si_addr;
  if (size_t(address - stacks) < MAX_THREADS * STACK)
    fail_at(after, "limit: the stack of thread %u has no room for its arrays", thread);
  fail_at(after, "out of bounds: thread %u of threadgroup %u touches %s", thread, threadgroup,
          place(address));
}
constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGXCPU};

struct Handlers {  // while a launch runs
  struct sigaction old[5];
  stack_t old_stack;
  timer_t timer;
  Handlers() {
    static byte memory[16 * PAGE];
    stack_t stack = {};
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, &old_stack);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &action, &old[i]);
    struct sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGXCPU;
    event._sigev_un._tid = pid_t(syscall(SYS_gettid));
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
    struct itimerspec time = {};
    time.it_value.tv_sec = time_t(launch->seconds);
    time.it_value.tv_nsec = long((launch->seconds - double(time.it_value.tv_sec)) * 1e9);
    timer_settime(timer, 0, &time, nullptr);
  }
  ~Handlers() {
    timer_delete(timer);
    for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

void reserve() {
  if (arena) return;
  auto map = [](size_t bytes, int protection) {
    void* memory = mmap(nullptr, bytes, protection,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : (byte*)memory;
  };
  stacks = map(MAX_THREADS * STACK, PROT_READ | PROT_WRITE);
  byte* memory = map(MAX_BUFFERS * DISTANCE, PROT_NONE);
  if (!stacks || !memory) fail(0, "the address space is too small (ulimit -v)");
  for (uint i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * STACK, PAGE, PROT_NONE);
  arena = memory;
}

void place_threads(const uint* at, const uint* size, const uint* groups) {
  const uint* grid = launch->grid;
  uint actual[3], whole = size[0] * size[1] * size[2];
  for (int d = 0; d < 3; d++) {
    uint rest = grid[d] - at[d] * size[d];
    actual[d] = rest < size[d] ? rest : size[d];  // the last one of a row may be smaller
  }
  thread_count = actual[0] * actual[1] * actual[2];
  for (uint i = 0; i < thread_count; i++) {
    uint3 position = {i % actual[0], i / actual[0] % actual[1], i / actual[0] / actual[1]};
    emu_attributes& a = fibers[i].attributes;
    fibers[i].index = i;
    a.thread_position_in_threadgroup = position;
    a.threadgroup_position_in_grid = uint3{at[0], at[1], at[2]};
    a.thread_position_in_grid =
        uint3{at[0] * size[0], at[1] * size[1], at[2] * size[2]} + position;
    a.threadgroups_per_grid = uint3{groups[0], groups[1], groups[2]};
    a.threads_per_grid = a.grid_size = uint3{grid[0], grid[1], grid[2]};
    a.grid_origin = uint3{0, 0, 0};
    a.threads_per_threadgroup = uint3{actual[0], actual[1], actual[2]};
    a.dispatch_threads_per_threadgroup = uint3{size[0], size[1], size[2]};
    a.dispatch_simdgroups_per_threadgroup = (whole + SIMD - 1) / SIMD;
    a.dispatch_quadgroups_per_threadgroup = (whole + 3) / 4;
    a.simdgroups_per_threadgroup = (thread_count + SIMD - 1) / SIMD;
    a.quadgroups_per_threadgroup = (thread_count + 3) / 4;
    a.simdgroup_index_in_threadgroup = i / SIMD;
    a.thread_index_in_simdgroup = i % SIMD;
    a.quadgroup_index_in_threadgroup = i / 4;
    a.thread_index_in_quadgroup = i % 4;
    a.thread_index_in_threadgroup = i;
    a.threads_per_simdgroup = a.thread_execution_width = SIMD;
  }
}

void run_grid() {
  uint size[3], groups[3], count = 1, threads = 1;
  for (int d = 0; d < 3; d++) {
    uint length = launch->grid[d], wanted = launch->threadgroup[d];
    size[d] = wanted < length ? wanted : length;  // as MLX does
    if (!size[d]) fail(0, "limit: an empty grid or threadgroup");
    groups[d] = (length + size[d] - 1) / size[d];
    count *= groups[d];
    threads *= size[d];
  }
  if (threads > MAX_THREADS) fail(0, "limit: %u threads in a threadgroup (1024)", threads);
  static uint* order;
  order = (uint*)realloc(order, count * sizeof(uint));
  arrange(order, count);
  for (uint i = 0; i < count; i++) {
    threadgroup = order[i];
    uint at[3] = {threadgroup % groups[0], threadgroup / groups[0] % groups[1],
                  threadgroup / groups[0] / groups[1]};
    place_threads(at, size, groups);
    run_threadgroup();
  }
}

void check_written() {
  for (uint b = 0; b < argument_count; b++) {
    const Buffer& buffer = buffers[b];
    size_t count = buffer.cells ? buffer.bytes / buffer.granule : 0;
    for (size_t i = 0; i < count; i++)
      if (!buffer.cells[i].writer)
        fail(0, "unwritten: no thread writes %s", place(buffer.base + i * buffer.granule));
  }
}

}  // namespace

extern "C" {

void emu_simd_function(void* slot, emu_exchange* exchange, int line, int column) {
  current->slot = slot;
  current->exchange = exchange;
  wait(SIMD_FUNCTION, line, column);
  current->exchange = nullptr;
}
void emu_simdgroup_barrier(uint fence, int line, int column) {
  wait(SIMDGROUP_BARRIER, line, column, fence);
}
void emu_threadgroup_barrier(uint fence, int line, int column) {
  wait(THREADGROUP_BARRIER, line, column, fence);
}
void emu_undefined(const char* what) { fail(current->line, "undefined: %s", what); }

unsigned long emu_threadgroup_variable(uint number, const char* name, unsigned long bytes,
                                       unsigned long alignment, int line) {
  number += argument_count;
  if (number >= buffer_count || !buffers[number].pages)
    give_cells(add_buffer(number, name, bytes, uint(alignment)), 0);
  Buffer& buffer = buffers[number];
  if (buffer.threadgroup != threadgroup + 1) {
    size_t total = 0;
    for (uint i = argument_count; i < buffer_count; i++) total += buffers[i].bytes;
    if (total > THREADGROUP_BYTES)
      fail(line, "limit: %zu bytes of threadgroup memory (%u)", total, THREADGROUP_BYTES);
    buffer.shared = true;
    buffer.threadgroup = threadgroup + 1;
    poison(buffer.base, bytes);
  }
  return (unsigned long)buffer.base;
}

// Returns whether all went well; if not, the launch says what was found.
int emu_run(Launch* what) {
  launch = what;
  current = nullptr;
  memset((void*)buffers, 0, sizeof buffers);
  buffer_count = now = 0;
  argument_count = launch->argument_count;
  random_state = 0x9E3779B97F4A7C15u * (launch->schedule + 1);
  volatile bool good = false;
  {
    Handlers handlers;
    if (!sigsetjmp(end_of_launch, 1)) {
      reserve();
      for (uint i = 0; i < argument_count; i++) {
        const Argument& argument = launch->arguments[i];
        Buffer& buffer = add_buffer(i, argument.name, argument.bytes, argument.element);
        buffer_addresses[i] = buffer.base;
        if (argument.initialised) memcpy(buffer.base, argument.data, argument.bytes);
        else poison(buffer.base, argument.bytes);
        buffer.read_only = !argument.output;
        if (argument.output) give_cells(buffer, argument.initialised ? HOST : 0);
      }
      run_grid();
      check_written();
      for (uint i = 0; i < argument_count; i++)
        if (launch->arguments[i].output)
          memcpy(launch->arguments[i].data, buffers[i].base, buffers[i].bytes);
      good = true;
    }
    launch = nullptr;
  }
  for (uint i = 0; i < buffer_count; i++) {
    if (!buffers[i].pages) continue;
    free(buffers[i].cells);
    madvise(buffers[i].pages, buffers[i].page_bytes, MADV_DONTNEED);
    mprotect(buffers[i].pages, buffers[i].page_bytes, PROT_NONE);
  }
  return good;
}

// libgcc before 13 has no conversion to bfloat16: it returns the bits in the low half.
float __truncsfbf2(float value) {
  uint bits;
  memcpy(&bits, &value, 4);
  bits = value != value ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  memcpy(&value, &bits, 4);
  return value;
}

// ---------------------------------------------------------------------- called by kernels

#define CALLER __builtin_return_address(0)
#define ACCESS(N)                                                                              \
  void __tsan_read##N(void* p) { check(p, N, false, N < 8 ? N : 8, CALLER); }                  \
  void __tsan_write##N(void* p) { check(p, N, true, N < 8 ? N : 8, CALLER); }                  \
  void __tsan_unaligned_read##N(void* p) { check(p, N, false, 1, CALLER); }                    \
  void __tsan_unaligned_write##N(void* p) { check(p, N, true, 1, CALLER); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void* __tsan_memcpy(void* to, void* from, size_t bytes) {
  check(from, bytes, false, 1, CALLER);
  check(to, bytes, true, 1, CALLER);
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  check(to, bytes, true, 1, CALLER);
  return memset(to, value, bytes);
}
void __tsan_init() {}

struct SourceLocation {  // what the data of UndefinedBehaviorSanitizer's functions begins with
  const char* file;
  uint line, column;
};
#define UNDEFINED(NAME, TEXT)                                                                  \
  void __ubsan_handle_##NAME(SourceLocation* at) {                                             \
    fail(int(at->line), "undefined: thread %u of threadgroup %u: " TEXT, current->index,       \
         threadgroup);                                                                         \
  }
UNDEFINED(shift_out_of_bounds, "a shift by a negative number or too many bits")
UNDEFINED(divrem_overflow, "an integer division by zero or overflow")
UNDEFINED(float_cast_overflow, "a conversion of a float that the integer type can't hold")
UNDEFINED(out_of_bounds, "an index outside of a thread's array")
}
