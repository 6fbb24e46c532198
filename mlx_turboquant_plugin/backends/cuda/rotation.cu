// The rotations of codecs/rotation.py, by one warp and for one vector.

// Walsh-Hadamard transform, orthonormal: lane l holds the channels l, l + 32, ...
template <int DIM, int N>
__device__ inline void walsh_hadamard(float (&x)[N]) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int bit = 1; bit < min(32, DIM); bit *= 2) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      float other = __shfl_xor_sync(0xFFFFFFFFu, x[i], bit);
      x[i] = lane & bit ? other - x[i] : x[i] + other;
    }
  }
#pragma unroll
  for (int step = 1; step < N; step *= 2) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (i & step) continue;
      float sum = x[i] + x[i + step];
      x[i + step] = x[i] - x[i + step];
      x[i] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) x[i] *= rsqrtf(float(DIM));
}

__device__ constexpr bool power_of_two(int x) { return (x & (x - 1)) == 0; }

// Numbers of a rotation: signs (DIM,), or a matrix (DIM, DIM) where DIM is no power of two.
__device__ constexpr int rotation_size(int dim) { return power_of_two(dim) ? dim : dim * dim; }

// Rotates `x` in place.
template <int DIM>
__device__ inline void rotate(float* x, const float* array) {
  constexpr int N = (DIM + 31) / 32;
  int lane = threadIdx.x % 32;
  float own[N];
  if constexpr (power_of_two(DIM)) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      own[i] = lane + 32 * i < DIM ? x[lane + 32 * i] * array[lane + 32 * i] : 0;
    }
    walsh_hadamard<DIM>(own);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) own[i] = 0;
#pragma unroll 4
    for (int j = 0; j < DIM; j++) {
      const float* row = array + j * DIM;
#pragma unroll
      for (int i = 0; i < N; i++) own[i] += lane + 32 * i < DIM ? x[j] * row[lane + 32 * i] : 0;
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (lane + 32 * i < DIM) x[lane + 32 * i] = own[i];
  }
  __syncwarp();
}

// Undoes rotate().
template <int DIM>
__device__ inline void rotate_back(float* x, const float* array) {
  constexpr int N = (DIM + 31) / 32;
  int lane = threadIdx.x % 32;
  float own[N];
  if constexpr (power_of_two(DIM)) {
#pragma unroll
    for (int i = 0; i < N; i++) own[i] = x[lane + 32 * i];
    walsh_hadamard<DIM>(own);
#pragma unroll
    for (int i = 0; i < N; i++) own[i] *= array[lane + 32 * i];
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) own[i] = 0;
#pragma unroll 4
    for (int j = 0; j < DIM; j++) {
#pragma unroll
      for (int i = 0; i < N; i++) {
        own[i] += lane + 32 * i < DIM ? x[j] * array[(lane + 32 * i) * DIM + j] : 0;
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (lane + 32 * i < DIM) x[lane + 32 * i] = own[i];
  }
  __syncwarp();
}
