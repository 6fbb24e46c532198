// Runs a CUDA kernel on the CPU: a thread is a fiber, and collective operations wait for
// all that take part.
#undef _FORTIFY_SOURCE  // Its jumps may not lead to another stack.
#include "cuda_emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <vector>

namespace emulator {

Index thread_index, block_index, grid_size;

namespace {

constexpr int STACK = 1 << 18;

struct Group {  // A warp or a block.
  int size = 0, arrived = 0;
  unsigned turn = 0;
};

struct Warp : Group {
  Words given[LANES], taken[LANES];
};

struct Fiber {
  ucontext_t context;  // Where it begins.
  jmp_buf place;       // Where it waits: a jump, unlike a context's switch, is no system call.
  std::unique_ptr<char[]> stack{new char[STACK]};  // Untouched pages take no memory.
  bool begun, done;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Group block;
jmp_buf scheduler;
void (*body)(void**, Shape*, Strides*);
void** pointers;
Shape* shapes;
Strides* strides;

Fiber& current() { return fibers[thread_index.x]; }

void yield() {
  if (!_setjmp(current().place)) _longjmp(scheduler, 1);
}

void resume() {
  if (_setjmp(scheduler)) return;
  if (current().begun) _longjmp(current().place, 1);
  current().begun = true;
  setcontext(&current().context);
}

// Whether the others of `group` are there; else the thread waits.
bool is_last(Group& group) {
  unsigned turn = group.turn;
  if (++group.arrived == group.size) return true;
  while (group.turn == turn) yield();
  return false;
}

void go_on(Group& group) { group.arrived = 0, group.turn++; }

void enter() {
  body(pointers, shapes, strides);
  current().done = true;
  yield();
}

void run_block(int threads, bool descending) {
  block = {threads};
  for (Warp& warp : warps) static_cast<Group&>(warp) = {LANES};
  for (Fiber& fiber : fibers) {
    fiber.begun = fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (int i = 0; i < threads; i++) {
      thread_index.x = descending ? threads - 1 - i : i;
      if (current().done) continue;
      running = true;
      resume();
    }
  }
}

}  // namespace

const Words* meet_warp(const Words& words) {
  Warp& warp = warps[thread_index.x / LANES];
  warp.given[lane()] = words;
  if (is_last(warp)) {
    std::memcpy(warp.taken, warp.given, sizeof warp.taken);
    go_on(warp);
  }
  return warp.taken;
}

void meet_block() {
  if (is_last(block)) go_on(block);
}

}  // namespace emulator

// Runs `kernel` for every thread of every block, threads in one of two orders.
extern "C" void launch(
    void (*kernel)(void**, Shape*, Strides*), void** given, Shape* given_shapes,
    Strides* given_strides, const int* grid, int threads, int descending) {
  using namespace emulator;
  body = kernel, pointers = given, shapes = given_shapes, strides = given_strides;
  grid_size = {grid[0], grid[1], grid[2]};
  fibers.resize(threads);
  warps.resize(threads / LANES);
  for (int z = 0; z < grid_size.z; z++)
    for (int y = 0; y < grid_size.y; y++)
      for (int x = 0; x < grid_size.x; x++) {
        block_index = {x, y, z};
        run_block(threads, descending);
      }
}
