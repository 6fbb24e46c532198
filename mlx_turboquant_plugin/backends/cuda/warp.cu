// What the lanes of a warp do together.

// All of them.
constexpr unsigned ALL = 0xFFFFFFFFu;
// Below all scores; finite, so that differences stay numbers.
constexpr float LOWEST = -1e30f;

// This warp's number in its block. By way of a shuffle the compiler knows that all lanes have the
// same: else it adds, to each shuffle where the number decides, one for lanes that came apart.
__device__ inline int this_warp() { return __shfl_sync(ALL, int(threadIdx.x) / 32, 0); }

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) x += __shfl_xor_sync(ALL, x, bit);
  return x;
}

// The largest of numbers of which none is negative.
__device__ inline float warp_max(float x) {
  return __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(x)));
}
