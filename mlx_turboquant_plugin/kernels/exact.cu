// The exact tokens: attention over a part of them, and old and new ones side by side.

// Writes the tokens of one part side by side: by blocks of their own, since a block that
// stores between its loads waits for each of them.
template <int DIM, typename X, typename P>
__device__ inline void join_tokens(
    const P& p, const X* old_tokens, const X* new_tokens, X* to, long long head, int part) {
  constexpr int WORDS = DIM * sizeof(X) / 16;
  for (int i = threadIdx.x; i < EXACT_PART * WORDS; i += THREADS) {
    int slot = part * EXACT_PART + i / WORDS;
    if (slot >= p.exact) break;
    const X* from = p.exact_token(old_tokens, new_tokens, head, slot, DIM);
    Words words;
    load_words(reinterpret_cast<const unsigned char*>(from) + i % WORDS * 16, words.x);
    reinterpret_cast<Words*>(to + (head * p.exact + slot) * DIM)[i % WORDS] = words;
  }
}

template <int ROWS, int DIM, int VALUE_DIM, typename P>
__device__ inline void attend_exact(const P& p, int part) {
  __shared__ float query[ROWS][DIM];
  __shared__ float weight[ROWS][EXACT_PART];
  int chunks = (p.group * p.count + ROWS - 1) / ROWS;
  int h = blockIdx.y / chunks, chunk = blockIdx.y % chunks, b = blockIdx.z;
  int warp = this_warp(), lane = threadIdx.x % 32;
  int last_row = p.group * p.count - 1;
  long long head = b * p.heads + h;
  int first = part * EXACT_PART, member = lane % 8;
  if (threadIdx.x < EXACT_PART) {
    int token = min(first + int(threadIdx.x), p.exact - 1);
    prefetch(p.exact_token(p.keys, p.new_keys, head, token, DIM), DIM);
    prefetch(p.exact_token(p.values, p.new_values, head, token, VALUE_DIM), VALUE_DIM);
  }
#pragma unroll 1
  for (int r = warp; r < ROWS; r += WARPS) {
    read_query<DIM>(p, query[r], b, h, min(chunk * ROWS + r, last_row));
  }
  __syncthreads();

  // Eight lanes to a token, and two channels at a time.
#pragma unroll
  for (int i = 0; i < EXACT_PART * 8 / THREADS; i++) {
    int slot = i * (THREADS / 8) + threadIdx.x / 8;
    int token = min(first + slot, p.exact - 1);
    const auto* key = p.exact_token(p.keys, p.new_keys, head, token, DIM);
    float score[ROWS] = {};
#pragma unroll
    for (int j = 0; j < (DIM + 15) / 16; j++) {
      int d = 16 * j + 2 * member;
      if (DIM % 16 && d >= DIM) break;
      auto pair = load_pair(key + d);
      float x = float(pair.first), y = float(pair.second);
#pragma unroll
      for (int r = 0; r < ROWS; r++) score[r] += query[r][d] * x + query[r][d + 1] * y;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int bit = 1; bit < 8; bit *= 2) score[r] += __shfl_xor_sync(ALL, score[r], bit);
      if (member == 0) weight[r][slot] = score[r];
    }
  }
  __syncthreads();

  float* sums = p.template sums_of_block<ROWS, VALUE_DIM>();
  float* weights = sums + ROWS * VALUE_DIM;
#pragma unroll 1
  for (int r = warp; r < ROWS; r += WARPS) {
    int n = min(chunk * ROWS + r, last_row) % p.count;
    const int* bound = p.bounds + (b * p.count + n) * 4;
    float own[EXACT_PART / 32], top = LOWEST, total = 0;
#pragma unroll
    for (int i = 0; i < EXACT_PART / 32; i++) {
      int slot = first + lane + 32 * i;
      bool seen = slot >= (slot < p.sinks ? bound[0] : p.exact - bound[3]);
      own[i] = seen && slot < p.exact - p.count + n + 1 ? weight[r][lane + 32 * i] : NEVER;
      top = fmaxf(top, own[i]);
    }
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, bit));
#pragma unroll
    for (int i = 0; i < EXACT_PART / 32; i++) {
      own[i] = exp2f(own[i] - top);
      weight[r][lane + 32 * i] = own[i];
      total += own[i];
    }
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) total += __shfl_xor_sync(ALL, total, bit);
    if (lane == 0) {
      weights[r * 3] = total;
      weights[r * 3 + 1] = top;
      weights[r * 3 + 2] = 0;
    }
  }
  __syncthreads();

  for (int d = threadIdx.x; d < VALUE_DIM; d += THREADS) {
    float sum[ROWS] = {};
#pragma unroll 16
    for (int slot = 0; slot < EXACT_PART; slot++) {
      int token = min(first + slot, p.exact - 1);
      float x = float(p.exact_token(p.values, p.new_values, head, token, VALUE_DIM)[d]);
#pragma unroll
      for (int r = 0; r < ROWS; r++) sum[r] += weight[r][slot] * x;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r * VALUE_DIM + d] = sum[r];
  }
}
