// Attention of a few queries over part of the tokens: one threadgroup of four simdgroups
// for each (split, chunk of ROWS query rows, KV head of a sequence). The first splits are
// for exact tokens and the others for codes; the simdgroups take tiles of tokens in turns.
//
// Output: partial (B * H, chunks, splits, ROWS, DV + 2), fp32: for each row the values'
// weighted sum, rotated in the splits of codes, then the maximum and the total of the
// softmax. Scores are in powers of two: `scale` includes log2(e).
using Values = ValueLayout<DV, VALUE_BITS, VALUE_AFFINE>;
// Neighbouring channels of exact values that a lane loads at once, and how often.
constexpr int WIDE = DV >= 128 ? 4 : 2;
constexpr int LOADS = (DV / WIDE + 31) / 32;
constexpr int CHANNELS = Values::CHANNELS > WIDE * LOADS ? Values::CHANNELS : WIDE * LOADS;
// Coded values that are loaded at once.
constexpr int STEP = Values::CHANNELS <= 4 ? 4 : 2;
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
const int chunk = threadgroup_position_in_grid.y;
const int chunks = threadgroups_per_grid.y;
const int kv_index = threadgroup_position_in_grid.z;
threadgroup float* scratch = all_scratch + simd * SCRATCH;

const int kv_heads = keys_shape[1];
const int exact_count = keys_shape[2];
const int count = queries_shape[2];
const int rows = queries_shape[1] / kv_heads * count;
const int code_count = k0_shape[3];
const int first_coded = sizes[0];
const int sinks = sizes[1];
const int exact_splits = sizes[2];
// Without those that make arrays large enough.
const int coded = sizes[3];
const int sequence = kv_index / kv_heads;
const int kv_head = kv_index % kv_heads;
const bool exact = split < exact_splits;
// The queries of a KV head are neighbours: row = head in the group * count + position.
const int first_row = chunk * ROWS;
const int query_offset = (kv_index * rows + first_row) * DK;
const int present = min(ROWS, rows - first_row);

// What each row sees, in indices of codes and of exact tokens, and the codes that any row sees.
const int bounds_offset = sequence * count * 4;
int codes_from = code_count, codes_to = 0;
for (int n = 0; n < count; n++) {
  codes_from = min(codes_from, bounds[bounds_offset + n * 4 + 1]);
  codes_to = max(codes_to, coded - bounds[bounds_offset + n * 4 + 2]);
}
if (thread_index < ROWS * 4) {
  int r = thread_index / 4, which = thread_index % 4;
  int bound = bounds[bounds_offset + (first_row + r) % count * 4 + which];
  bound = which == 2 ? coded - bound : which == 3 ? exact_count - bound : bound;
  // Rows that are not there see nothing.
  limits[thread_index] = r < present ? bound : NEVER;
}
if (thread_index < MOST_LEVELS) {
  key_levels[thread_index] = levels[thread_index];
  value_levels[thread_index] = levels[MOST_LEVELS + thread_index];
}

if (exact) {
  // [row][channel]
  for (int i = thread_index; i < ROWS * DK; i += THREADS) {
    q[i] = i < present * DK ? float(queries[query_offset + i]) * scale[0] : 0.0f;
  }
} else {
  rotate_queries<DK, KEY_SEGMENTS, ROWS, SIMDS, BALANCED, SORTED>(
      queries + query_offset, present, scale[0], balance + kv_head * DK,
      layout + kv_head * (DK + 1), key_rotation, q, all_scratch, thread_index);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const int rotary = sizes[5];
if (!exact && (KEY_AFFINE || BIASED)) {
  for (int r = simd; r < ROWS; r += SIMDS) {
    float sum = 0, unturned = 0;
    for (int c = lane; c < DK; c += 32) {
      sum += q[c * ROWS + r];
      if (BIASED && c >= 2 * rotary && r < present) {
        unturned += float(queries[query_offset + r * DK + c]) * bias[kv_head * DK + c];
      }
    }
    sum = simd_sum(sum);
    unturned = simd_sum(unturned);
    if (lane == 0) {
      query_sums[r] = sum;
      rest[r] = unturned * scale[0];
    }
  }
  if (BIASED) {
    multiply_pairs<DK, ROWS, THREADS>(
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

if (exact) {
  const auto own_keys = keys + size_t(kv_index) * exact_count * DK;
  const auto own_values = values + size_t(kv_index) * exact_count * DV;
  for (int start = (split * SIMDS + simd) * EXACT_TILE; start < exact_count;
       start += exact_splits * SIMDS * EXACT_TILE) {
    // Eight lanes share a token.
    const int part = lane % 8;
    for (int i = lane / 8; i < EXACT_TILE; i += 4) {
      float products[ROWS] = {0};
      if (start + i < exact_count) {
        for (int c = 4 * part; c < DK; c += 32) {
          float x[4], y[4];
          load_wide<4>(own_keys + (start + i) * DK + c, x);
          UNROLL
          for (int r = 0; r < ROWS; r++) {
            load_rows<4>(q + r * DK + c, y);
            products[r] += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
          }
        }
      }
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        products[r] += simd_shuffle_xor(products[r], 4);
        products[r] += simd_shuffle_xor(products[r], 2);
        products[r] += simd_shuffle_xor(products[r], 1);
        if (part == r) {
          scratch[i * ROWS + r] = products[r];
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const int slot = start + lane;
    float weights[1][ROWS], shrink[ROWS];
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      int oldest = limits[r * 4 + (slot < sinks ? 0 : 3)];
      int newest = exact_count - count + (first_row + r) % count;
      bool seen = slot >= oldest && slot <= newest;
      weights[0][r] = seen ? scratch[lane * ROWS + r] : MASKED;
    }
    softmax.template add<1>(weights, shrink);
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      scratch[lane * ROWS + r] = weights[0][r];
      UNROLL
      for (int c = 0; c < CHANNELS; c++) {
        sums[r][c] *= shrink[r];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < min(EXACT_TILE, exact_count - start); i++) {
      float weight[ROWS];
      load_rows<ROWS>(scratch + i * ROWS, weight);
      UNROLL
      for (int j = 0; j < LOADS; j++) {
        int c = (32 * j + lane) * WIDE;
        if (c < DV) {
          float x[WIDE];
          load_wide<WIDE>(own_values + (start + i) * DV + c, x);
          UNROLL
          for (int k = 0; k < WIDE; k++) {
            UNROLL
            for (int r = 0; r < ROWS; r++) {
              sums[r][j * WIDE + k] += weight[r] * x[k];
            }
          }
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
} else {
  constexpr int KEY_BYTES = KEY_BITS == 3 ? DK / 8 : DK * KEY_BITS / 8;
  const size_t first_code = size_t(kv_index) * code_count;
  const SegmentLevels segment_levels(first_bits_of<DK, KEY_SEGMENTS, SORTED>(layout, kv_head));
  for (int start = (codes_from / TILE + (split - exact_splits) * SIMDS + simd) * TILE;
       start < codes_to; start += (splits - exact_splits) * SIMDS * TILE) {
    const int own = start + 4 * lane;
    const int own_count = clamp(code_count - own, 0, 4);
    const bool aligned = code_count % 4 == 0;
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
          pairs, coarse_cos, coarse_sin, fine, rotary, first_coded + start, scratch, lane, weights);
    }
    UNROLL
    for (int k = 0; k < 4; k++) {
      const int index = own + k;
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        bool seen = k < own_count && index >= limits[r * 4 + 1] && index < limits[r * 4 + 2];
        weights[k][r] = seen ? weights[k][r] + (BIASED ? rest[r] : 0.0f) : MASKED;
      }
    }
    float shrink[ROWS];
    softmax.template add<4>(weights, shrink);
    UNROLL
    for (int k = 0; k < 4; k++) {
      float size = 0;
      if (k < own_count) {
        size = VALUE_AFFINE ? 1.0f : size_of(uint(value_scale[first_code + own + k]));
      }
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        scratch[(4 * lane + k) * ROWS + r] = weights[k][r] * size;
      }
    }
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      UNROLL
      for (int c = 0; c < CHANNELS; c++) {
        sums[r][c] *= shrink[r];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    // Tokens that no row sees, and those that make up a full step, weigh nothing.
    for (int i = start; i < min(start + TILE, codes_to); i += STEP) {
      float x[STEP][Values::CHANNELS];
      UNROLL
      for (int k = 0; k < STEP; k++) {
        const size_t token = first_code + min(i + k, code_count - 1);
        const size_t at = token * Values::BYTES;
        Planes planes = {
            (device const uint8_t*)v0 + at,
            (device const uint8_t*)v1 + at,
            (device const uint8_t*)v2 + at};
        load_values<DV, VALUE_BITS, VALUE_AFFINE>(
            value_levels, planes, value_scale + token * Values::GROUPS,
            value_zero + token * Values::GROUPS, lane, x[k]);
      }
      UNROLL
      for (int k = 0; k < STEP; k++) {
        float weight[ROWS];
        load_rows<ROWS>(scratch + (i + k - start) * ROWS, weight);
        UNROLL
        for (int r = 0; r < ROWS; r++) {
          UNROLL
          for (int c = 0; c < Values::CHANNELS; c++) {
            sums[r][c] += weight[r] * x[k][c];
          }
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Merge the simdgroups.
UNROLL
for (int r = 0; r < ROWS; r++) {
  float total = simd_sum(softmax.total[r]);
  if (lane == 0) {
    statistics[(simd * ROWS + r) * 2] = softmax.top[r];
    statistics[(simd * ROWS + r) * 2 + 1] = total;
  }
  if (exact) {
    UNROLL
    for (int j = 0; j < LOADS; j++) {
      UNROLL
      for (int k = 0; k < WIDE; k++) {
        int c = (32 * j + lane) * WIDE + k;
        if (c < DV) {
          scratch[r * DV + c] = sums[r][j * WIDE + k];
        }
      }
    }
  } else {
    UNROLL
    for (int u = 0; u < Values::UNITS; u++) {
      int unit = lane * Values::UNITS + u;
      for (int field = 0; field < Values::FIELDS && unit < Values::ALL; field++) {
        scratch[r * DV + Values::channel(unit, field)] = sums[r][u * Values::FIELDS + field];
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
device float* own_partial =
    partial + size_t((kv_index * chunks + chunk) * splits + split) * ROWS * (DV + 2);
for (int i = thread_index; i < ROWS * (DV + 2); i += THREADS) {
  const int r = i / (DV + 2), c = i % (DV + 2);
  float top = MASKED, sum = 0;
  UNROLL
  for (int s = 0; s < SIMDS; s++) {
    top = max(top, statistics[(s * ROWS + r) * 2]);
  }
  UNROLL
  for (int s = 0; s < SIMDS; s++) {
    float share = fast::exp2(statistics[(s * ROWS + r) * 2] - top);
    float own = c < DV ? all_scratch[s * SCRATCH + r * DV + c] : statistics[(s * ROWS + r) * 2 + 1];
    sum += share * own;
  }
  own_partial[i] = c == DV ? top : sum;
}
