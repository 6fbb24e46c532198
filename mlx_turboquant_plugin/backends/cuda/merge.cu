// The second launch: the splits of one query row together, those of codes rotated back. A
// learned sink is one more score, without a value.

// The share of each split in a row, and whether it is of codes, by a warp; returns the sum of all
// weights. weights: of the first split, see Problem; those of the next are `stride` further.
// learned: the score of the learned sink, if LEARNED.
template <bool LEARNED>
__device__ inline float weigh_splits(
    const float* weights, long long stride, int splits, float learned, float* share,
    bool* quantized) {
  float top = LOWEST, sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < splits; i += 32) top = fmaxf(top, weights[i * stride + 1]);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, bit));
  if constexpr (LEARNED) top = fmaxf(top, learned);
#pragma unroll 1
  for (int i = threadIdx.x; i < splits; i += 32) {
    const float* weight = weights + i * stride;
    share[i] = exp2_fast(weight[1] - top);
    quantized[i] = weight[2] != 0;
    sum += weight[0] * share[i];
  }
  sum = warp_sum(sum);
  if constexpr (LEARNED) sum += exp2_fast(learned - top);
  return sum;
}

// ROWS: of a block of the first launch. learned_sinks: (H G,), or not read.
template <int VALUE_DIM, int ROWS, bool LEARNED, typename S, typename T>
__device__ inline void merge_splits(
    const float* partial, const float* rotation, const S* learned_sinks, T* out, int splits,
    int count) {
  constexpr long long SPLIT_SIZE = ROWS * (VALUE_DIM + 3);
  constexpr int WIDTH = (VALUE_DIM + 31) / 32 * 32, GROUPS = MERGE_THREADS / WIDTH;
  __shared__ float share[MERGED_SPLITS];
  __shared__ bool quantized[MERGED_SPLITS];
  __shared__ float plain[GROUPS][WIDTH], rotated[GROUPS][WIDTH];
  __shared__ float inverse;  // of the sum of all weights
  int row = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  int row_blocks = (gridDim.x + ROWS - 1) / ROWS;
  partial += ((long long)(b * gridDim.y + h) * row_blocks + row / ROWS) * splits * SPLIT_SIZE;
  const float* sums = partial + row % ROWS * VALUE_DIM;
  const float* weights = partial + ROWS * VALUE_DIM + row % ROWS * 3;

  if (this_warp() == 0) {
    float learned = 0;
    if constexpr (LEARNED) {
      learned = float(learned_sinks[h * (gridDim.x / count) + row / count]) * LOG2_E;
    }
    float sum = weigh_splits<LEARNED>(weights, SPLIT_SIZE, splits, learned, share, quantized);
    if (threadIdx.x == 0) inverse = __fdividef(1, sum);
  }
  __syncthreads();

  int group = threadIdx.x / WIDTH, d = threadIdx.x % WIDTH;
  if (group < GROUPS) {
    float own[2] = {};
    if (d < VALUE_DIM) {
#pragma unroll 4
      for (int i = group; i < splits; i += GROUPS) {
        float x = sums[i * SPLIT_SIZE + d] * share[i];
        own[0] += quantized[i] ? 0 : x;
        own[1] += quantized[i] ? x : 0;
      }
    }
    plain[group][d] = own[0];
    rotated[group][d] = own[1];
  }
  __syncthreads();
  if (threadIdx.x < WIDTH) {
    for (int i = 1; i < GROUPS; i++) {
      plain[0][d] += plain[i][d];
      rotated[0][d] += rotated[i][d];
    }
  }
  __syncthreads();
  if (this_warp() == 0) rotate_back<VALUE_DIM>(rotated[0], rotation);
  __syncthreads();
  if (threadIdx.x < VALUE_DIM) {
    long long head = (long long)(b * gridDim.y + h) * (gridDim.x / count) + row / count;
    T* to = out + (head * count + row % count) * VALUE_DIM;
    to[d] = static_cast<T>((plain[0][d] + rotated[0][d]) * inverse);
  }
}
