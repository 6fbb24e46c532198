// Attention over a split of the quantized tokens, TILE of them at a time and warp by warp.
//
// A lane is (g, c), lane = 4 g + c, as the matrix units have it. Of a tile it holds
//
//     keys:                      values:                    scores:
//         g  0  1 ..  7              g  0  1 ..  7              c  0  1  2  3
//       c 0  0  4 .. 28            c 0  0  4 .. 28            g 0  0  1  2  3
//         1  1  5 .. 29              1  1  5 .. 29              1  4  5  6  7
//         2  2  6 .. 30              2  2  6 .. 30             .. .. .. .. ..
//         3  3  7 .. 31              3  3  7 .. 31              7 28 29 30 31
//       g: TILE / 8 tokens         c: TILE / 4 tokens         g: the tokens of keys
//       c: 4 of 16 bytes           g: words of each           c: rows c, 4 + c

// What a warp keeps of the softmax for this lane's rows c, 4 + c, ...: of each the highest
// score, with the size of the value, and sums of weights relative to it.
template <int NT, int TILE>
struct Softmax {
  static constexpr int TOKENS = TILE / 8;

  float top[NT], total[NT], halves[NT];

  __device__ void begin() {
#pragma unroll
    for (int nt = 0; nt < NT; nt++) top[nt] = LOWEST, total[nt] = 0, halves[nt] = 0;
  }

  // The weights of a tile as whole numbers, with the sizes of its values, as Values takes them:
  // times `grow` they are relative to the new top, and what is relative to the old one is times
  // `shrink`.
  __device__ void weigh(
      const float (&score)[NT][TOKENS], const unsigned (&size)[TILE / 32],
      unsigned (&weight)[NT][TILE / 32][2], float (&shrink)[NT], float (&grow)[NT]) {
    float octave[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) octave[t] = octave_of(byte_of(size, t));
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
      float tile_top = LOWEST;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) tile_top = fmaxf(tile_top, score[nt][t] + octave[t]);
#pragma unroll
      for (int bit = 4; bit < 32; bit *= 2) {
        tile_top = fmaxf(tile_top, __shfl_xor_sync(ALL, tile_top, bit));
      }
      float new_top = fmaxf(top[nt], tile_top);
      shrink[nt] = exp2_fast(top[nt] - new_top);
      grow[nt] = exp2_fast(tile_top - new_top);
      top[nt] = new_top;
      float tile_total = 0;
      unsigned whole[TOKENS], whole_sum = 0;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        tile_total += exp2_fast(score[nt][t] - new_top);
        float x = exp2_fast(score[nt][t] + octave[t] - tile_top);
        whole[t] = __float_as_uint(fmaf(x, WHOLE, TO_WHOLE));
        whole_sum += whole[t];
      }
      total[nt] = total[nt] * shrink[nt] + tile_total;
      whole_sum -= TOKENS * __float_as_uint(TO_WHOLE);
      halves[nt] = halves[nt] * shrink[nt] + float(int(whole_sum)) * grow[nt];
      share(whole, weight[nt]);
    }
  }

  // The sums of all lanes.
  __device__ void finish() {
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
#pragma unroll
      for (int bit = 4; bit < 32; bit *= 2) {
        total[nt] += __shfl_xor_sync(ALL, total[nt], bit);
        halves[nt] += __shfl_xor_sync(ALL, halves[nt], bit);
      }
    }
  }

 private:
  // To the lanes that multiply them: weights of four tokens at a time.
  static __device__ void share(
      const unsigned (&whole)[TOKENS], unsigned (&weight)[TILE / 32][2]) {
    constexpr int VALUE_TOKENS = TILE / 4;
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    unsigned part[2][TOKENS / 4];
#pragma unroll
    for (int i = 0; i < TOKENS / 4; i++) {
      unsigned four[4] = {whole[4 * i], whole[4 * i + 1], whole[4 * i + 2], whole[4 * i + 3]};
      split_bytes(four, part[0][i], part[1][i]);
    }
#pragma unroll
    for (int i = 0; i < VALUE_TOKENS / 4; i++) {
      int token = c * VALUE_TOKENS + 4 * i;
      int source = token / TOKENS * 4 + g / 2, place = 4 * i % TOKENS / 4;
      unsigned upper = __shfl_sync(ALL, part[0][place], source);
      unsigned lower = __shfl_sync(ALL, part[1][place], source);
      weight[i / 2][i % 2] = g % 2 ? lower : upper;
    }
  }
};

// Which codes all rows of a sequence see, and which some row sees.
struct Seen {
  int low = 0x7FFFFFFF, high = -0x7FFFFFFF, all_low = -0x7FFFFFFF, all_high = 0x7FFFFFFF;

  template <typename P>
  __device__ Seen(const P& p, int b) {
#pragma unroll 1
    for (int n = 0; n < p.count; n++) {
      const int* bound = p.bounds + (b * p.count + n) * 4;
      int from = bound[1], to = p.quantized - bound[2];
      low = min(low, from), all_low = max(all_low, from);
      high = max(high, to), all_high = min(all_high, to);
    }
  }
};

// Which codes this lane's rows c, 4 + c, ... see.
template <int NT, int TILE>
struct SeenByRows {
  static constexpr int TOKENS = TILE / 8;

  int from[NT], to[NT];

  template <typename P>
  __device__ SeenByRows(const P& p, const BlockRows<4 * NT>& rows) {
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
      const int* bound = rows.bound(p, 4 * nt + threadIdx.x % 4);
      from[nt] = bound[1];
      to[nt] = p.quantized - bound[2];
    }
  }

  // Scores of what they do not see.
  __device__ void hide(int tile, float (&score)[NT][TOKENS]) const {
    int first = tile * TILE + threadIdx.x % 32 / 4 * TOKENS;
#pragma unroll
    for (int i = 0; i < NT * TOKENS; i++) {
      int nt = i / TOKENS, t = i % TOKENS;
      bool is_seen = first + t >= from[nt] && first + t < to[nt];
      score[nt][t] = is_seen ? score[nt][t] : NEVER;
    }
  }
};

// The tiles that this warp takes, each WARPS further than the one before.
struct OwnTiles {
  int first, end;
};

// Of a split of what some row sees. Groups of tiles, one for each warp, are not cut: together they
// read whole lines of keys.
template <int TILE>
__device__ inline OwnTiles own_tiles(const Seen& seen, int split, int splits) {
  int first_group = seen.low / (TILE * WARPS);
  int groups = max(0, (seen.high + TILE * WARPS - 1) / (TILE * WARPS) - first_group);
  int end = (first_group + groups * (split + 1) / splits) * WARPS;
  return {
      (first_group + groups * split / splits) * WARPS + this_warp(),
      min(end, (seen.high + TILE - 1) / TILE)};
}

// What a block that attends to codes keeps in shared memory besides its bias, in part for one
// use after the other: first the queries, then what each warp has for itself.
template <int ROWS, int DIM, int VALUE_DIM, typename Keys, typename Bias>
union alignas(16) QuantizedMemory {
  struct {
    float query[ROWS][DIM];
    typename Keys::Whole whole[ROWS];
  };
  union {
    typename Bias::Scratch turned;
    float sum[ROWS][VALUE_DIM];
  } warp[WARPS];
};

// The rows of a block, as Keys multiplies codes by them, and what a bias keeps of them.
template <
    typename TileKeys, bool BALANCED, bool SORTED, bool BIASED, int ROWS, int DIM,
    typename Scales, typename Bias, typename P>
__device__ inline void prepare_queries(
    const P& p, const BlockRows<ROWS>& rows, int first_bits, float (&query)[ROWS][DIM],
    typename TileKeys::Whole (&whole)[ROWS], Scales (&scale)[ROWS], Bias& bias) {
#pragma unroll 1
  for (int r = this_warp(); r < ROWS; r += WARPS) {
    float* x = query[r];
    read_query<DIM>(p, x, rows, r);
    __syncwarp();
    if constexpr (BIASED) {
      bias.template begin_row<DIM>(r, x, p.bias + rows.h * DIM, p.rotary);
    }
    if constexpr (BALANCED || SORTED) balance_and_sort<DIM, BALANCED, SORTED>(p, x, rows.h);
    TileKeys::to_whole_numbers(x, p.rotation, first_bits, scale[r], whole[r]);
  }
}

// The sums of a block's warps together. sum: of each warp at `distance`.
template <int ROWS, int VALUE_DIM, typename P>
__device__ inline void merge_warps(
    const P& p, const float* sum, int distance, const float (*weight)[ROWS][2], float unit) {
  float* sums = p.template sums_of_block<ROWS, VALUE_DIM>();
  float* weights = sums + ROWS * VALUE_DIM;
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * VALUE_DIM; i += THREADS) {
    int r = i / VALUE_DIM;
    float top = LOWEST, x = 0, total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, weight[w][r][1]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float share = exp2f(weight[w][r][1] - top);
      x += sum[w * distance + i] * share;
      total += weight[w][r][0] * share;
    }
    sums[i] = x * unit;
    if (i % VALUE_DIM == 0) {
      weights[r * 3] = total;
      weights[r * 3 + 1] = top;
      weights[r * 3 + 2] = 1;
    }
  }
}

// Writes the sums of all warps, and what they are relative to. unit: what they are multiplied by.
template <
    int ROWS, int VALUE_DIM, int NT, int TILE, typename TileValues, typename Memory, typename P>
__device__ inline void finish_block(
    const P& p, Softmax<NT, TILE>& softmax, const TileValues& values, Memory& memory, float unit) {
  __shared__ float block_weight[WARPS][ROWS][2];
  int warp = this_warp(), g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  softmax.finish();
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    if (g == 0) {
      block_weight[warp][4 * nt + c][0] = softmax.total[nt];
      block_weight[warp][4 * nt + c][1] = softmax.top[nt];
    }
  }
  values.store(softmax.halves, memory.warp[warp].sum);
  __syncthreads();
  constexpr int DISTANCE_OF_WARPS = sizeof(memory.warp[0]) / sizeof(float);
  merge_warps<ROWS, VALUE_DIM>(p, memory.warp[0].sum[0], DISTANCE_OF_WARPS, block_weight, unit);
}

// WHOLE_TILES: see Keys. PAIRS: of a rotated key bias, or 0.
template <
    int DIM, int VALUE_DIM, int KEY_BITS, int SEGMENTS, int VALUE_BITS, int NT, int TILE,
    bool WHOLE_TILES, bool BALANCED, bool SORTED, int PAIRS, typename P>
__device__ inline void attend_codes(const P& p, int split, int splits) {
  using TileKeys = Keys<DIM, KEY_BITS, SEGMENTS, NT, TILE, WHOLE_TILES>;
  using TileValues = Values<VALUE_DIM, VALUE_BITS, NT, TILE, WHOLE_TILES>;
  constexpr int ROWS = 4 * NT;
  constexpr bool BIASED = PAIRS > 0;
  using Bias = BiasMemory<ROWS, BIASED ? PAIRS : 1, TILE>;
  __shared__ QuantizedMemory<ROWS, DIM, VALUE_DIM, TileKeys, Bias> memory;
  __shared__ Bias bias;
  __shared__ typename TileKeys::Scale scale[ROWS][SEGMENTS];
  __shared__ typename TileKeys::LevelsOfCodes::Memory key_levels;
  __shared__ typename TileValues::LevelsOfCodes::Memory value_levels;

  BlockRows<ROWS> rows(p);
  int warp = this_warp(), first_bits = first_bits_of<DIM, SORTED>(p.layout, rows.h);
  Seen seen(p, rows.b);
  OwnTiles own = own_tiles<TILE>(seen, split, splits);
  long long head_token = (long long)(rows.b * p.heads + rows.h) * p.quantized;
  Codes key_codes = p.key_codes.after(head_token, TileKeys::K::ROWS, SEGMENTS);
  Codes value_codes = p.value_codes.after(head_token, TileValues::V::ROWS, 1);
  if (own.first < own.end) {
    TileKeys::prefetch(key_codes, p.quantized, own.first);
    TileValues::prefetch(value_codes, p.quantized, own.first);
    if constexpr (BIASED) bias.prefetch_turns(p.rotary, p.first_quantized, own.first);
  }
  if constexpr (BIASED) bias.begin_tiles(p.rotary, p.waves, p.first_quantized);
  prepare_queries<TileKeys, BALANCED, SORTED, BIASED>(
      p, rows, first_bits, memory.query, memory.whole, scale, bias);
  if constexpr (BIASED) wait_for_copies();
  if (threadIdx.x == 0) {
    TileKeys::LevelsOfCodes::write(key_levels, p.quantized >> 31, first_bits);
    TileValues::LevelsOfCodes::write(value_levels, p.quantized >> 31);
  }
  __syncthreads();
  TileKeys keys;
  keys.begin(memory.whole, scale, key_levels);
  SeenByRows<NT, TILE> seen_by_rows(p, rows);
  __syncthreads();

  Softmax<NT, TILE> softmax;
  TileValues values;
  softmax.begin();
  values.begin(value_levels);
  for (int tile = own.first; tile < own.end; tile += WARPS) {
    float score[NT][TILE / 8] = {};
    if constexpr (BIASED) {
      bias.scores(p.rotary, p.first_quantized, tile, memory.warp[warp].turned, score);
    }
    keys.load(key_codes, p.quantized, tile);
    unsigned value_size[TILE / 32];
    TileKeys::load_row(value_codes.scale, p.quantized, tile, value_size);
    keys.add_scores(score);
    values.load(value_codes.plane, p.quantized, tile);
    bool all_see = tile * TILE >= seen.all_low && (tile + 1) * TILE <= seen.all_high;
    if (!all_see) seen_by_rows.hide(tile, score);
    unsigned weight[NT][TILE / 32][2];
    float shrink[NT], grow[NT];
    softmax.weigh(score, value_size, weight, shrink, grow);
    values.add(weight, shrink, grow);
  }
  finish_block<ROWS, VALUE_DIM>(p, softmax, values, memory, 1 / (WHOLE * LEVELS<VALUE_BITS>::unit));
}
