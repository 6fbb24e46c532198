// Every Metal thread is a fiber: a stack of its own, left where the thread has to wait for others.
#pragma once
#include <cstdint>
#include <cstring>

#include "launch.h"

namespace {

constexpr uint MAX_THREADS = 1024, SIMD = 32, MAX_BUFFERS = 64;
constexpr size_t PAGE = 4096, STACK = 32 * PAGE;

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
    if (launch->schedule < 2)
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

}  // namespace
