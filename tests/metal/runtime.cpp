// Runs kernels that were compiled against shim.h. Those compiled with clang's ThreadSanitizer
// call the functions at the end of this file at each access to memory; the sanitizer's own
// library is not linked.
#include <csignal>
#include <ctime>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "memory.h"

namespace {

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
  if (signal == SIGILL)  // what the check of local pointers ends with
    fail_at(after, "undefined: thread %u of threadgroup %u: an index outside of a thread's array",
            thread, threadgroup);
  if (signal == SIGFPE)
    fail_at(after, "undefined: thread %u of threadgroup %u: an integer division by zero", thread,
            threadgroup);
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

#define CALLER __builtin_return_address(0)

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
void emu_undefined(const char* what) {
  if (current->state == SIMD_FUNCTION) fail(current->line, "undefined: %s", what);
  fail_at(CALLER, "undefined: %s", what);
}

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
        if (argument.initialized) memcpy(buffer.base, argument.data, argument.bytes);
        else poison(buffer.base, argument.bytes);
        buffer.read_only = !argument.output;
        if (argument.output) give_cells(buffer, argument.initialized ? HOST : 0);
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

// ---------------------------------------------------------------------- put in by sanitizers

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

#define UNDEFINED(NAME, TEXT)                                                                  \
  void __ubsan_handle_##NAME() {                                                               \
    fail_at(CALLER, "undefined: thread %u of threadgroup %u: " TEXT, current->index,           \
            threadgroup);                                                                      \
  }
UNDEFINED(shift_out_of_bounds, "a shift by a negative number or too many bits")
UNDEFINED(divrem_overflow, "an integer division by zero or overflow")
UNDEFINED(float_cast_overflow, "a conversion of a float that the integer type can't hold")
UNDEFINED(out_of_bounds, "an index outside of a thread's array")
}
