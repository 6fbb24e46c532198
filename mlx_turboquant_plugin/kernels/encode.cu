// The codes and scales that codecs/lloyd_max.py finds for rotated vectors, a warp for each.

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) x += __shfl_xor_sync(ALL, x, bit);
  return x;
}

// The code of the level nearest to x, in units of levels, and that level.
template <int BITS>
__device__ inline int nearest(float x, float& level) {
  using L = LEVELS<BITS>;
  constexpr int HALF = 1 << (BITS - 1);
  float size = fabsf(x), found = L::positive(0);
  int magnitude = 0;
#pragma unroll
  for (int i = 1; i < HALF; i++) {
    bool above = size > 0.5f * (L::positive(i - 1) + L::positive(i));
    found = above ? L::positive(i) : found;
    magnitude += above;
  }
  level = x < 0 ? -found : found;
  return x < 0 ? HALF - 1 - magnitude : HALF + magnitude;
}

// x: (count, DIM). codes: (count, DIM), one in each byte. scales: (count,).
template <int DIM, int BITS>
__device__ inline void encode_vectors(
    const float* x, unsigned char* codes, unsigned char* scales, int count) {
  constexpr int N = (DIM + 31) / 32;
  long long vector = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (vector >= count) return;
  float own[N], squares = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    own[i] = lane + 32 * i < DIM ? x[vector * DIM + lane + 32 * i] : 0;
    squares += own[i] * own[i];
  }
  float rms = fmaxf(sqrtf(warp_sum(squares) / DIM), 1e-20f);
  float start = rintf((log2f(rms) + 13) * 12);
  float best = __int_as_float(0x7F800000), best_scale = 0;
  for (int i = 0; i < 5; i++) {
    // 0, -1, 1, -2, 2
    float scale = fminf(fmaxf(start + (i % 2 ? -(i + 1) / 2 : i / 2), 0), 255);
    float size = exp2f(scale / 12 - 13) / LEVELS<BITS>::unit, error = 0, along = 0;
#pragma unroll
    for (int j = 0; j < N; j++) {
      float level;
      nearest<BITS>(own[j] / size, level);
      float missing = lane + 32 * j < DIM ? own[j] - level * size : 0;
      error += missing * missing;
      along += missing * own[j];
    }
    along = warp_sum(along) / (rms * sqrtf(DIM));
    error = warp_sum(error) + 16 * along * along;
    if (error < best) best = error, best_scale = scale;
  }
  float size = exp2f(best_scale / 12 - 13) / LEVELS<BITS>::unit;
#pragma unroll
  for (int i = 0; i < N; i++) {
    float level;
    int code = nearest<BITS>(own[i] / size, level);
    if (lane + 32 * i < DIM) codes[vector * DIM + lane + 32 * i] = code;
  }
  if (lane == 0) scales[vector] = int(best_scale);
}
