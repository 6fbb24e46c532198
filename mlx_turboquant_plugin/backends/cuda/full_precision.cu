// The full-precision tokens: attention over a split of them, and old and new ones side by side.

// Writes the tokens of one split side by side: by blocks of their own, since a block that
// stores between its loads waits for each of them.
template <int DIM, typename X, typename P>
__device__ inline void join_tokens(
    const P& p, const X* old_tokens, const X* new_tokens, X* to, long long head, int split) {
  constexpr int WORDS = DIM * sizeof(X) / 16;
  for (int i = threadIdx.x; i < FULL_SPLIT * WORDS; i += THREADS) {
    int slot = split * FULL_SPLIT + i / WORDS;
    if (slot >= p.full) break;
    const X* from = p.full_token(old_tokens, new_tokens, head, slot, DIM);
    Words words;
    load_words(reinterpret_cast<const unsigned char*>(from) + i % WORDS * 16, words.x);
    reinterpret_cast<Words*>(to + (head * p.full + slot) * DIM)[i % WORDS] = words;
  }
}

// Scores of all rows with one key, of which two lanes have a half each, their `member`.
template <int ROWS, int DIM, typename X>
__device__ inline void score_full(
    const X* key, int member, const float (&query)[ROWS][DIM], float (&score)[ROWS]) {
  constexpr int CHANNELS = sizeof(Words) / sizeof(X), STEP = 2 * CHANNELS;
#pragma unroll 2
  for (int i = 0; i < (DIM + STEP - 1) / STEP; i++) {
    int d = i * STEP + member * CHANNELS;
    if (DIM % STEP && d >= DIM) break;
    auto x = load_channels<CHANNELS>(key + d);
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) score[r] += query[r][d + j] * float(x.channel[j]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) score[r] += __shfl_xor_sync(ALL, score[r], 1);
}

// The scores of row r with the tokens from `first` on become weights, by a warp. to: their sum,
// their power of two and that they are not of codes, see Problem.
template <int ROWS, typename P>
__device__ inline void weigh_full(
    const P& p, const BlockRows<ROWS>& rows, int r, int first, float (&weight)[FULL_SPLIT],
    float* to) {
  int lane = threadIdx.x % 32, n = rows.row(r) % p.count;
  const int* bound = rows.bound(p, r);
  float own[FULL_SPLIT / 32], top = LOWEST, total = 0;
#pragma unroll
  for (int i = 0; i < FULL_SPLIT / 32; i++) {
    int slot = first + lane + 32 * i;
    bool seen = slot >= (slot < p.sinks ? bound[0] : p.full - bound[3]);
    own[i] = seen && slot < p.full - p.count + n + 1 ? weight[lane + 32 * i] : NEVER;
    top = fmaxf(top, own[i]);
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, bit));
#pragma unroll
  for (int i = 0; i < FULL_SPLIT / 32; i++) {
    own[i] = exp2f(own[i] - top);
    weight[lane + 32 * i] = own[i];
    total += own[i];
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) total += __shfl_xor_sync(ALL, total, bit);
  if (lane == 0) to[0] = total, to[1] = top, to[2] = 0;
}

template <int ROWS, int DIM, int VALUE_DIM, typename P>
__device__ inline void attend_full(const P& p, int split) {
  using X = typename P::Full;
  alignas(16) __shared__ float query[ROWS][DIM], weight[ROWS][FULL_SPLIT];
  __shared__ const X* values[FULL_SPLIT];
  BlockRows<ROWS> rows(p);
  int warp = this_warp();
  // Two lanes to a token.
  static_assert(THREADS == 2 * FULL_SPLIT);
  int first = split * FULL_SPLIT, slot = threadIdx.x / 2, member = threadIdx.x % 2;
  int token = min(first + slot, p.full - 1), head = rows.b * p.heads + rows.h;
  const X* key = p.full_token(p.keys, p.new_keys, head, token, DIM);
  if (member == 0) {
    values[slot] = p.full_token(p.values, p.new_values, head, token, VALUE_DIM);
    prefetch(key, DIM);
    prefetch(values[slot], VALUE_DIM);
  }
#pragma unroll 1
  for (int r = warp; r < ROWS; r += WARPS) read_query<DIM>(p, query[r], rows, r);
  __syncthreads();

  float score[ROWS] = {};
  score_full(key, member, query, score);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (member == 0) weight[r][slot] = score[r];
  }
  __syncthreads();

  float* sums = p.template sums_of_block<ROWS, VALUE_DIM>();
#pragma unroll 1
  for (int r = warp; r < ROWS; r += WARPS) {
    weigh_full(p, rows, r, first, weight[r], sums + ROWS * VALUE_DIM + r * 3);
  }
  __syncthreads();

#pragma unroll 1
  for (int d = threadIdx.x; d < VALUE_DIM; d += THREADS) {
    float sum[ROWS] = {};
#pragma unroll 8
    for (int slot = 0; slot < FULL_SPLIT; slot++) {
      float x = float(values[slot][d]);
#pragma unroll
      for (int r = 0; r < ROWS; r++) sum[r] += weight[r][slot] * x;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r * VALUE_DIM + d] = sum[r];
  }
}
