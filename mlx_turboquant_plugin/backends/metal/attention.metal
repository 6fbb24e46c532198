// What decode.metal does in parts: queries, their products with codes, a key bias, the softmax,
// and the sums of simdgroups together.
//
// ROWS is the number of query rows (pairs of a query head and a position) that a
// threadgroup serves: 1, 2, 4 or 8. Rows lie side by side in threadgroup memory, so that
// one load serves a channel or a token for all of them.

// A position that no sequence reaches.
constant constexpr int NEVER = 0x7fffffff;

template <int ROWS>
METAL_FUNC void load_rows(threadgroup const float* from, thread float (&to)[ROWS]) {
  if (ROWS % 4 == 0) {
    UNROLL
    for (int i = 0; i < ROWS; i++) {
      to[i] = ((threadgroup const float4*)from)[i / 4][i % 4];
    }
  } else {
    UNROLL
    for (int i = 0; i < ROWS; i++) {
      to[i] = from[i];
    }
  }
}

// COUNT neighbouring elements, at a multiple of so many, in one load.
template <int COUNT, typename T>
METAL_FUNC void load_wide(device const T* from, thread float (&to)[COUNT]) {
  metal::vec<T, COUNT> x = *(device const metal::vec<T, COUNT>*)from;
  UNROLL
  for (int k = 0; k < COUNT; k++) {
    to[k] = float(x[k]);
  }
}

// Queries as codes are multiplied by them, [channel][row]: times the balance, sorted, and their
// segments rotated. `order`: of the channels, if SORTED. All threads take part. `scratch`:
// D * ROWS numbers.
template <int D, int SEGMENTS, int ROWS, bool BALANCED, bool SORTED, typename T>
METAL_FUNC void rotate_queries(
    device const T* queries, int present, float scale, device const float* balance,
    device const int* order, device const float* rotation, threadgroup float* rotated,
    threadgroup float* scratch, int thread_index) {
  constexpr int SEGMENT = D / SEGMENTS, COUNT = (SEGMENT + 31) / 32;
  constexpr bool FAST_ROTATION = (SEGMENT & (SEGMENT - 1)) == 0;
  const int lane = thread_index % 32, simd = thread_index / 32;
  // Of a row and a segment.
  for (int part = simd; part < ROWS * SEGMENTS; part += SIMDS) {
    const int r = part / SEGMENTS, first = part % SEGMENTS * SEGMENT;
    float x[COUNT];
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      const int c = 32 * j + lane;
      x[j] = 0;
      if (c < SEGMENT && r < present) {
        const int channel = SORTED ? order[first + c] : first + c;
        x[j] = float(queries[r * D + channel]) * scale;
        x[j] *= BALANCED ? balance[channel] : 1.0f;
      }
    }
    if (FAST_ROTATION) {
      multiply_signs<SEGMENT>(x, rotation, lane);
      walsh_hadamard<SEGMENT>(x, lane);
    }
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      const int c = 32 * j + lane;
      if (c < SEGMENT) {
        (FAST_ROTATION ? rotated : scratch)[(first + c) * ROWS + r] = x[j];
      }
    }
  }
  if (FAST_ROTATION) {
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int c = thread_index; c < D; c += 32 * SIMDS) {
    const int first = c / SEGMENT * SEGMENT;
    float y[ROWS] = {0};
    for (int i = 0; i < SEGMENT; i++) {
      float x[ROWS];
      load_rows<ROWS>(scratch + (first + i) * ROWS, x);
      const float turn = rotation[i * SEGMENT + c - first];
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        y[r] += x[r] * turn;
      }
    }
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      rotated[c * ROWS + r] = y[r];
    }
  }
}

// Of each rotary pair what the cosine and what the sine of its angle is multiplied by in a
// score, for all rows. `between` and `distance` as in rotated_bias().
template <int D, int ROWS, typename T>
METAL_FUNC void multiply_pairs(
    device const T* queries, int present, float scale, device const float* bias, int rotary,
    int between, int distance, threadgroup float* pairs, int thread_index) {
  for (int i = thread_index; i < rotary * ROWS; i += THREADS) {
    const int f = i / ROWS, r = i % ROWS;
    const int first = f * between, second = first + distance;
    float q1 = 0, q2 = 0;
    if (r < present) {
      q1 = float(queries[r * D + first]) * scale;
      q2 = float(queries[r * D + second]) * scale;
    }
    const float b1 = bias[first], b2 = bias[second];
    pairs[f * ROWS + r] = q1 * b1 + q2 * b2;
    pairs[(rotary + f) * ROWS + r] = q2 * b1 - q1 * b2;
  }
}

// Of each row, for affine codes, the sum of the channels as codes are multiplied by them; and what
// the channels of a bias add to its scores that do not turn. All threads take part.
template <int D, int ROWS, bool BIASED, typename T>
METAL_FUNC void sum_queries(
    device const T* queries, int present, float scale, device const float* bias, int rotary,
    threadgroup const float* rotated, threadgroup float* sums, threadgroup float* rest,
    int thread_index) {
  const int lane = thread_index % 32;
  for (int r = thread_index / 32; r < ROWS; r += SIMDS) {
    float sum = 0, unturned = 0;
    for (int c = lane; c < D; c += 32) {
      sum += rotated[c * ROWS + r];
      if (BIASED && c >= 2 * rotary && r < present) {
        unturned += float(queries[r * D + c]) * bias[c];
      }
    }
    sum = simd_sum(sum);
    unturned = simd_sum(unturned);
    if (lane == 0) {
      sums[r] = sum;
      rest[r] = unturned * scale;
    }
  }
}

// Adds what the rotary pairs of a key bias make of the scores of a lane's four tokens.
//   pairs: of multiply_pairs(); position: of the tile's first token.
//   turned: 2 * rotary * ROWS numbers of the simdgroup's own.
template <int ROWS>
METAL_FUNC void add_bias(
    threadgroup const float* pairs, device const float* coarse_cos,
    device const float* coarse_sin, device const float* fine, int rotary, int position,
    threadgroup float* turned, int lane, thread float (&scores)[4][ROWS]) {
  // Turn the pairs to the tile's first position, then the table serves its tokens.
  for (int f = lane; f < rotary; f += 32) {
    const float2 turn = angle(coarse_cos, coarse_sin, fine, rotary, f, position);
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      const float a = pairs[f * ROWS + r], b = pairs[(rotary + f) * ROWS + r];
      turned[f * ROWS + r] = a * turn.x + b * turn.y;
      turned[(rotary + f) * ROWS + r] = b * turn.x - a * turn.y;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int f = 0; f < 2 * rotary; f++) {
    float pair[ROWS];
    load_rows<ROWS>(turned + f * ROWS, pair);
    UNROLL
    for (int k = 0; k < 4; k++) {
      const float x = fine[f * ANGLES + 4 * lane + k];
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        scores[k][r] += pair[r] * x;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Products of all rows with four neighbouring channel-major vectors, of which `count`
// are there: products[k][r] = sum over c of queries[c][r] * level of channel c of vector k.
//   planes: of the first of these vectors; byte i of a vector is `stride` * i further.
//   sizes: of the vectors' segments. Levels are multiplied by them if there are two: sums of
//     their own for both would be too many registers.
template <int D, int BITS, int SEGMENTS, bool AFFINE, int ROWS>
METAL_FUNC void multiply_keys(
    threadgroup const float* queries, threadgroup const float* levels,
    thread const SegmentLevels& segment_levels, Planes planes,
    thread const float (&sizes)[SEGMENTS][4], int stride, int count,
    thread float (&products)[4][ROWS]) {
  using Byte = Fields<BITS>;
  constexpr int FIELDS = Byte::COUNT;
  constexpr int BYTES = D / FIELDS;
  // Loads that are under way at once.
  constexpr int DEPTH = BYTES % 4 == 0 ? 4 : BYTES % 2 == 0 ? 2 : 1;
  const bool aligned = stride % 4 == 0;
  for (int start = 0; start < BYTES; start += DEPTH) {
    uint low[DEPTH], upper[DEPTH], high[DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; d++) {
      const int at = (start + d) * stride;
      low[d] = load_four(planes.low + at, count, aligned);
      upper[d] = BITS == 3 ? load_four(planes.low_of_upper_fields + at, count, aligned) : 0;
      high[d] = BITS == 3 ? load_four(planes.high + at, count, aligned) : 0;
    }
    UNROLL
    for (int d = 0; d < DEPTH; d++) {
      UNROLL
      for (int field = 0; field < FIELDS; field++) {
        // If there are two segments.
        const uint four = segment_levels.four(low[d], field % 2);
        float q[ROWS];
        load_rows<ROWS>(queries + (field * BYTES + start + d) * ROWS, q);
        UNROLL
        for (int k = 0; k < 4; k++) {
          float x;
          if (SEGMENTS == 2) {
            x = segment_level(four, k) * sizes[field % SEGMENTS][k];
          } else if (BITS == 3) {
            uint code = ((field < 4 ? low[d] : upper[d]) >> (8 * k + 2 * (field % 4))) & 3;
            code |= ((high[d] >> (8 * k + field)) & 1) << 2;
            x = level<AFFINE>(levels, code);
          } else {
            x = level<AFFINE>(levels, Byte::code(low[d] >> (8 * k), field));
          }
          UNROLL
          for (int r = 0; r < ROWS; r++) {
            products[k][r] += q[r] * x;
          }
        }
      }
    }
  }
}

// Scores of four neighbouring quantized keys, of which `count` are there, without their bias.
//   scales, zeros: of the first of these keys; those of the next segment are `stride` further.
//   query_sums: of the rows, for affine codes.
template <int D, int BITS, int SEGMENTS, bool AFFINE, int ROWS, typename Scale>
METAL_FUNC void score_codes(
    threadgroup const float* queries, threadgroup const float* query_sums,
    threadgroup const float* levels, thread const SegmentLevels& segment_levels, Planes planes,
    device const Scale* scales, device const Scale* zeros, int stride, int count,
    thread float (&scores)[4][ROWS]) {
  float sizes[SEGMENTS][4];
  UNROLL
  for (int k = 0; k < 4; k++) {
    UNROLL
    for (int s = 0; s < SEGMENTS; s++) {
      const Scale scale = k < count ? scales[s * stride + k] : Scale(0);
      sizes[s][k] = AFFINE ? float(scale) : size_of(uint(scale));
      sizes[s][k] *= SEGMENTS == 1 ? 1.0f : levels[WIDTH];
    }
  }
  multiply_keys<D, BITS, SEGMENTS, AFFINE>(
      queries, levels, segment_levels, planes, sizes, stride, count, scores);
  UNROLL
  for (int k = 0; k < 4; k++) {
    const float size = SEGMENTS == 1 ? sizes[0][k] : 1.0f;
    const float zero = AFFINE && k < count ? float(zeros[k]) : 0.0f;
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      scores[k][r] = scores[k][r] * size + (AFFINE ? query_sums[r] * zero : 0.0f);
    }
  }
}

// The online softmax of one simdgroup (Milakov and Gimelshein, arXiv 1805.02867), in
// powers of two: running maxima, the same in all lanes, and totals, each lane's own.
template <int ROWS>
struct Softmax {
  float top[ROWS];
  float total[ROWS];

  Softmax() {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      top[r] = MASKED;
      total[r] = 0;
    }
  }

  // Turn the scores of a tile, COUNT tokens of each lane, into weights, and give the
  // factor by which what was accumulated shrinks.
  template <int COUNT>
  void add(thread float (&scores)[COUNT][ROWS], thread float (&shrink)[ROWS]) {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      float best = scores[0][r];
      UNROLL
      for (int k = 1; k < COUNT; k++) {
        best = max(best, scores[k][r]);
      }
      best = max(top[r], simd_max(best));
      shrink[r] = fast::exp2(top[r] - best);
      top[r] = best;
      total[r] *= shrink[r];
      UNROLL
      for (int k = 0; k < COUNT; k++) {
        float weight = scores[k][r] > 0.5f * MASKED ? fast::exp2(scores[k][r] - best) : 0.0f;
        total[r] += weight;
        scores[k][r] = weight;
      }
    }
  }
};

template <int ROWS, int CHANNELS>
METAL_FUNC void shrink_sums(
    thread const float (&shrink)[ROWS], thread float (&sums)[ROWS][CHANNELS]) {
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    UNROLL
    for (int c = 0; c < CHANNELS; c++) {
      sums[r][c] *= shrink[r];
    }
  }
}

// The sums of all simdgroups together, as decode.metal writes them.
//   sums: of each simdgroup (ROWS, D), `stride` apart; statistics: the maximum and the total of
//   each simdgroup and row.
template <int D, int ROWS>
METAL_FUNC void merge_simdgroups(
    threadgroup const float* sums, int stride, threadgroup const float* statistics,
    device float* to, int thread_index) {
  for (int i = thread_index; i < ROWS * (D + 2); i += THREADS) {
    const int r = i / (D + 2), c = i % (D + 2);
    float top = MASKED, sum = 0;
    UNROLL
    for (int s = 0; s < SIMDS; s++) {
      top = max(top, statistics[(s * ROWS + r) * 2]);
    }
    UNROLL
    for (int s = 0; s < SIMDS; s++) {
      float share = fast::exp2(statistics[(s * ROWS + r) * 2] - top);
      float own = c < D ? sums[s * stride + r * D + c] : statistics[(s * ROWS + r) * 2 + 1];
      sum += share * own;
    }
    to[i] = c == D ? top : sum;
  }
}
