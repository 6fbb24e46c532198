// Attention of a few queries over a split of the tokens: one threadgroup of four simdgroups
// for each (split, block of ROWS query rows, KV head of a sequence). The first splits are
// for full-precision tokens and the others for codes; the simdgroups take tiles of tokens in turns.
//
// Output: partial (B * H, row_blocks, splits, ROWS, DV + 2), fp32: for each row the values'
// weighted sum, rotated in the splits of codes, then the maximum and the total of the
// softmax. Scores are in powers of two: `scale` includes log2(e).
using Values = ValueLayout<DV, VALUE_BITS, VALUE_AFFINE>;
constexpr int FULL_CHANNELS = FullLayout<DV>::CHANNELS;
constexpr int CHANNELS = Values::CHANNELS > FULL_CHANNELS ? Values::CHANNELS : FULL_CHANNELS;
// Scratch of a simdgroup: weights of a tile, turned pairs of a bias, at last its sums.
constexpr int WIDEST = DK > DV ? DK : DV;
constexpr int SCRATCH = (WIDEST > TILE ? WIDEST : TILE) * ROWS;

// Declared as float4 to be aligned for it.
threadgroup float4 q_memory[DK * ROWS / 4];
threadgroup float4 pairs_memory[BIASED ? DK * ROWS / 4 : 1];
threadgroup float4 scratch_memory[SIMDS * SCRATCH / 4];
threadgroup float key_levels[MOST_LEVELS];
threadgroup float value_levels[MOST_LEVELS];
threadgroup float query_sums[ROWS];
threadgroup float rest[ROWS];
threadgroup int limits[ROWS * 4];
threadgroup float statistics[SIMDS * ROWS * 2];
threadgroup float* q = (threadgroup float*)q_memory;
threadgroup float* pairs = (threadgroup float*)pairs_memory;
threadgroup float* all_scratch = (threadgroup float*)scratch_memory;

const int thread_index = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int split = threadgroup_position_in_grid.x;
const int splits = threadgroups_per_grid.x;
const int row_block = threadgroup_position_in_grid.y;
const int row_blocks = threadgroups_per_grid.y;
const int kv_index = threadgroup_position_in_grid.z;
threadgroup float* scratch = all_scratch + simd * SCRATCH;

const int kv_heads = keys_shape[1];
const int full_count = keys_shape[2];
const int count = queries_shape[2];
const int rows = queries_shape[1] / kv_heads * count;
const int code_count = k0_shape[3];
const int first_quantized = sizes[0];
const int sinks = sizes[1];
const int full_splits = sizes[2];
// Without those that make arrays large enough.
const int quantized = sizes[3];
const int sequence = kv_index / kv_heads;
const int kv_head = kv_index % kv_heads;
const bool full_precision = split < full_splits;
// The queries of a KV head are neighbours: row = head in the group * count + position.
const int first_row = row_block * ROWS;
const int query_offset = (kv_index * rows + first_row) * DK;
const int present = min(ROWS, rows - first_row);

// What each row sees, in indices of codes and of full-precision tokens, and the codes that any
// row sees.
const int bounds_offset = sequence * count * 4;
int codes_from = code_count, codes_to = 0;
for (int n = 0; n < count; n++) {
  codes_from = min(codes_from, bounds[bounds_offset + n * 4 + 1]);
  codes_to = max(codes_to, quantized - bounds[bounds_offset + n * 4 + 2]);
}
if (thread_index < ROWS * 4) {
  int r = thread_index / 4, which = thread_index % 4;
  int bound = bounds[bounds_offset + (first_row + r) % count * 4 + which];
  bound = which == 2 ? quantized - bound : which == 3 ? full_count - bound : bound;
  // Rows that are not there see nothing.
  limits[thread_index] = r < present ? bound : NEVER;
}
if (thread_index < MOST_LEVELS) {
  key_levels[thread_index] = levels[thread_index];
  value_levels[thread_index] = levels[MOST_LEVELS + thread_index];
}

if (full_precision) {
  // [row][channel]
  for (int i = thread_index; i < ROWS * DK; i += THREADS) {
    q[i] = i < present * DK ? float(queries[query_offset + i]) * scale[0] : 0.0f;
  }
} else {
  rotate_queries<DK, KEY_SEGMENTS, ROWS, BALANCED, SORTED>(
      queries + query_offset, present, scale[0], balance + kv_head * DK,
      layout + kv_head * (DK + 1), key_rotation, q, all_scratch, thread_index);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const int rotary = sizes[5];
if (!full_precision && (KEY_AFFINE || BIASED)) {
  sum_queries<DK, ROWS, BIASED>(
      queries + query_offset, present, scale[0], bias + kv_head * DK, rotary, q, query_sums, rest,
      thread_index);
  if (BIASED) {
    multiply_pairs<DK, ROWS>(
        queries + query_offset, present, scale[0], bias + kv_head * DK, rotary, sizes[6], sizes[7],
        pairs, thread_index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

Softmax<ROWS> softmax;
float sums[ROWS][CHANNELS];
UNROLL
for (int r = 0; r < ROWS; r++) {
  UNROLL
  for (int c = 0; c < CHANNELS; c++) {
    sums[r][c] = 0;
  }
}

if (full_precision) {
  const FullSlots slots = {full_count, sinks, count, first_row};
  const size_t first = size_t(kv_index) * full_count;
  attend_full<DK, DV>(
      keys + first * DK, values + first * DV, slots, (split * SIMDS + simd) * FULL_TILE,
      full_splits * SIMDS * FULL_TILE, q, limits, scratch, lane, softmax, sums);
  store_full<DV>(sums, scratch, lane);
} else {
  constexpr int KEY_BYTES = KEY_BITS == 3 ? DK / 8 : DK * KEY_BITS / 8;
  const size_t first_code = size_t(kv_index) * code_count;
  const auto quantized_values =
      values_from<Values>(first_code, v0, v1, v2, value_scale, value_zero);
  const SegmentLevels segment_levels(first_bits_of<DK, KEY_SEGMENTS, SORTED>(layout, kv_head));
  for (int start = (codes_from / TILE + (split - full_splits) * SIMDS + simd) * TILE;
       start < codes_to; start += (splits - full_splits) * SIMDS * TILE) {
    const int own = start + 4 * lane;
    const int own_count = clamp(code_count - own, 0, 4);
    float weights[4][ROWS] = {{0}};
    if (own_count > 0) {
      const size_t at = first_code * KEY_BYTES + own;
      Planes planes = {k0 + at, k1 + at, k2 + at};
      const size_t scales = first_code * KEY_SEGMENTS + own;
      score_codes<DK, KEY_BITS, KEY_SEGMENTS, KEY_AFFINE>(
          q, query_sums, key_levels, segment_levels, planes, key_scale + scales,
          key_zero + scales, code_count, own_count, weights);
    }
    if (BIASED) {
      add_bias(
          pairs, coarse_cos, coarse_sin, fine, rotary, first_quantized + start, scratch, lane,
          weights);
    }
    float shrink[ROWS];
    weigh_codes<ROWS, BIASED>(own, own_count, limits, rest, softmax, weights, shrink);
    share_weights<VALUE_AFFINE>(
        weights, quantized_values.scales + own, own_count, scratch + 4 * lane * ROWS);
    shrink_sums(shrink, sums);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    // Tokens that no row sees weigh nothing.
    add_values<DV, VALUE_BITS, VALUE_AFFINE>(
        quantized_values, start, min(TILE, codes_to - start), code_count - 1, value_levels,
        scratch, lane, sums);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  store_quantized<DV, VALUE_BITS, VALUE_AFFINE>(sums, scratch, lane);
}
UNROLL
for (int r = 0; r < ROWS; r++) {
  float total = simd_sum(softmax.total[r]);
  if (lane == 0) {
    statistics[(simd * ROWS + r) * 2] = softmax.top[r];
    statistics[(simd * ROWS + r) * 2 + 1] = total;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
merge_simdgroups<DV, ROWS>(
    all_scratch, SCRATCH, statistics,
    partial + size_t((kv_index * row_blocks + row_block) * splits + split) * ROWS * (DV + 2),
    thread_index);
