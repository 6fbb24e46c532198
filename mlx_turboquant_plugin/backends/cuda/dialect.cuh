// What codes.metal, decode.metal and merge.metal use of the Metal Shading Language, in CUDA.
//
// Functions need no __device__, since MLX compiles everything for the device; `device` is a
// word of Metal's, so that nobody may write __device__ after this.

#define device
#define constant
#define thread
// Of pointers; memory is declared as __shared__.
#define threadgroup
#define METAL_FUNC inline
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")

#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup simdgroup_index()

// By way of a shuffle the compiler knows that all lanes have the same, as in this_warp() of
// warp.cu.
inline int simdgroup_index() { return __shfl_sync(0xFFFFFFFFu, int(threadIdx.x) / 32, 0); }

using uint = unsigned int;
using ushort = unsigned short;
using uint8_t = unsigned char;

namespace metal {
template <typename T, int N>
struct alignas(N * sizeof(T)) vec {
  T element[N];
  T operator[](int i) const { return element[i]; }
};
}  // namespace metal

// CUDA's own have no such constructor and no index.
struct MetalFloat2 {
  float x, y;
  MetalFloat2(float x, float y) : x(x), y(y) {}
};
#define float2 MetalFloat2
#define float4 metal::vec<float, 4>

enum class mem_flags { mem_threadgroup };
#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp()

template <typename T>
inline T simd_shuffle_xor(T x, int other) { return __shfl_xor_sync(0xFFFFFFFFu, x, other); }

inline float simd_sum(float x) {
  for (int bit = 1; bit < 32; bit *= 2) x += simd_shuffle_xor(x, bit);
  return x;
}

inline float simd_max(float x) {
  for (int bit = 1; bit < 32; bit *= 2) x = max(x, simd_shuffle_xor(x, bit));
  return x;
}

inline int clamp(int x, int low, int high) { return min(max(x, low), high); }

#define rsqrt rsqrtf
namespace fast {
inline float exp2(float x) { return exp2f(x); }
}
