// The first of two launches: attention of some query rows over a split of the tokens.
//
// A query row is a query head of one KV head at one position. A block serves ROWS rows of
// one KV head over one split: FULL_SPLIT full-precision tokens, or a run of quantized ones.
// It writes a weighted sum of values, not normalized, with the sum of its weights and the
// power of two that both are relative to. Scores are in powers of two throughout.
//
// Loops that a block runs once or twice, or whose turns wait for nothing, are not unrolled: a
// first prompt waits for the compiler, and MLX looks at all machine code at every launch.

// Bytes that come from memory together.
constexpr int LINE = 128;
#define NEVER __int_as_float(0xFF800000)

// Codes of one side, (B, H, rows, T) for keys and (B, H, T, rows) for values.
struct Planes {
  const unsigned char* of[3];
};
struct Codes {
  Planes plane;
  const unsigned char* scale;  // (B, H, segments, T)

  // Those of another head, so many tokens further.
  __device__ Codes after(long long tokens, int rows, int segments) const {
    const unsigned char* const* of = plane.of;
    return {
        {of[0] + tokens * rows, of[1] + tokens * rows, of[2] + tokens * rows},
        scale + tokens * segments};
  }
};

// All arrays are contiguous.
template <typename Q, typename X>
struct Problem {
  using Full = X;
  const Q* queries;               // (B, H G, N, D)
  const X *keys, *values;         // (B, H, older, D)
  Codes key_codes, value_codes;
  const X *new_keys, *new_values; // (B, H, E - (older - drop), D) or not read
  const int* bounds;              // (B, N, 4), see backends/problem.py
  const float* rotation;          // of the keys
  const float* balance;           // (H, 1, D) or not read
  const int* layout;              // (H, D + 1), see KVCodec, or not read
  const float* bias;              // (H, D) or, as what follows, not read
  RotaryPairs rotary;             // of the bias, and the waves: see RotaryArray
  const unsigned* waves;
  int first_quantized;            // position of the first code
  float scale;
  int heads, group, count;  // H, G and N
  int sinks, older, drop, full, quantized;  // full: E, quantized: T
  int splits;
  // Output (B, H, row_blocks, splits, ROWS (DV + 3)): sums, and then for each row the sum of its
  // weights, their power of two and whether they are of codes.
  float* partial;

  template <int ROWS, int VALUE_DIM>
  __device__ float* sums_of_block() const {
    long long block = (long long)(blockIdx.z * gridDim.y + blockIdx.y) * splits + blockIdx.x;
    return partial + block * (ROWS * (VALUE_DIM + 3));
  }

  // Where the full-precision token `slot` is: in the older or in the new ones.
  __device__ const X* full_token(
      const X* old_tokens, const X* new_tokens, long long head, int slot, int dim) const {
    if (slot >= sinks) slot += drop;
    if (slot < older) return old_tokens + (head * older + slot) * dim;
    return new_tokens + (head * (full - older + drop) + slot - older) * dim;
  }
};

template <typename Q, typename X>
__device__ inline Problem<Q, X> problem(
    const Q* queries, const X* keys, const X* values, Planes key_planes,
    const unsigned char* key_scale, Planes value_planes, const unsigned char* value_scale) {
  return {queries, keys, values, {key_planes, key_scale}, {value_planes, value_scale}};
}

// The rows of a block: those of row block number `row_block`, of KV head h in sequence b.
template <int ROWS>
struct BlockRows {
  int h, row_block, b, last;

  template <typename P>
  __device__ explicit BlockRows(const P& p) {
    int row_blocks = (p.group * p.count + ROWS - 1) / ROWS;
    h = blockIdx.y / row_blocks, row_block = blockIdx.y % row_blocks, b = blockIdx.z;
    last = p.group * p.count - 1;
  }

  // Row r of the block, among those of its head; what is missing repeats the last.
  __device__ int row(int r) const { return min(row_block * ROWS + r, last); }

  template <typename P>
  __device__ const int* bound(const P& p, int r) const {
    return p.bounds + (b * p.count + row(r) % p.count) * 4;
  }
};

// Channels side by side, that are loaded at once.
template <int N, typename X>
struct alignas(N * sizeof(X)) Channels {
  X channel[N];
};

template <int N, typename X>
__device__ inline Channels<N, X> load_channels(const X* from) {
  return *reinterpret_cast<const Channels<N, X>*>(from);
}

// The ``count`` numbers from `from` on, and others near them, to the cache.
template <typename X>
__device__ inline void prefetch(const X* from, int count) {
  for (int i = 0; i < count; i += LINE / sizeof(X)) prefetch_line(from + i);
}

// Query row r of this block, times the scale, in fp32 and shared memory.
template <int DIM, int ROWS, typename P>
__device__ inline void read_query(const P& p, float* to, const BlockRows<ROWS>& rows, int r) {
  long long rows_of_head = p.group * p.count;
  const auto* from =
      p.queries + ((rows.b * p.heads + rows.h) * rows_of_head + rows.row(r)) * DIM;
  for (int d = threadIdx.x % 32; d < DIM; d += 32) to[d] = float(from[d]) * (p.scale * LOG2_E);
}

// Times the balance, and in the order of the segments: a query in shared memory, by a warp.
template <int DIM, bool BALANCED, bool SORTED, typename P>
__device__ inline void balance_and_sort(const P& p, float* x, int h) {
  constexpr int N = (DIM + 31) / 32;
  int lane = threadIdx.x % 32;
  float own[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    int channel = min(lane + 32 * i, DIM - 1);
    if constexpr (SORTED) channel = p.layout[h * (DIM + 1) + channel];
    own[i] = x[channel];
    if constexpr (BALANCED) own[i] *= p.balance[h * DIM + channel];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (lane + 32 * i < DIM) x[lane + 32 * i] = own[i];
  }
  __syncwarp();
}
