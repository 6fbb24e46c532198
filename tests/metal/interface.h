// What compiled kernels (shim.h) and the runtime (runtime.cpp) know of each other.
#pragma once

typedef unsigned int uint;
typedef uint uint3 __attribute__((ext_vector_type(3)));

struct emu_attributes {
  uint3 dispatch_threads_per_threadgroup, grid_origin, grid_size, thread_position_in_grid,
      thread_position_in_threadgroup, threadgroup_position_in_grid, threadgroups_per_grid,
      threads_per_grid, threads_per_threadgroup;
  uint dispatch_quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup,
      quadgroup_index_in_threadgroup, quadgroups_per_threadgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup, thread_execution_width, thread_index_in_quadgroup,
      thread_index_in_simdgroup, thread_index_in_threadgroup, threads_per_simdgroup;
};

// The values of mem_flags, and the bits of a fence.
enum { EMU_FENCE_DEVICE = 1, EMU_FENCE_THREADGROUP = 2 };

extern "C" {
// Computes a simdgroup function in place: slots[lane] is what that lane brought, if its bit of
// `active` is set.
typedef void emu_exchange(void** slots, uint active);

// Each returns when all threads of the simdgroup, or of the threadgroup, have come to it.
void emu_simd_function(void* slot, emu_exchange* exchange, int line, int column);
void emu_simdgroup_barrier(uint fence, int line, int column);
void emu_threadgroup_barrier(uint fence, int line, int column);

// The address of a variable that the threads of a threadgroup share, from its number in the
// kernel. It is poisoned when the first thread of a threadgroup asks.
unsigned long emu_threadgroup_variable(uint number, const char* name, unsigned long bytes,
                                       unsigned long alignment, int line = __builtin_LINE());

// Ends the launch: the thread did something whose result Metal leaves undefined.
void emu_undefined(const char* what);
}
