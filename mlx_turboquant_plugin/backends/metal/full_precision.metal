// What decode.metal does with full-precision tokens: a simdgroup takes FULL_TILE of them at a time.
//
// For scores eight lanes share a token: lane 8 i + part has the channels 4 part, ..., 4 part + 3 of
// each 32 of the tokens i, i + 4, ... For weights a lane has a token. For sums a lane has channels
// of all tokens, see FullLayout.

// The channels of token-major values: WIDE neighbouring ones that a lane loads at once, the
// (32 j + lane)-th so many, and LOADS times.
template <int D>
struct FullLayout {
  static constant constexpr const int WIDE = D >= 128 ? 4 : 2;
  static constant constexpr const int LOADS = (D / WIDE + 31) / 32;
  static constant constexpr const int CHANNELS = WIDE * LOADS;
};

// The tokens, in slots: how many there are, sinks among them, and the last ones that belong to
// the queries of a pass. `first_row`: of the threadgroup's rows.
struct FullSlots {
  int count, sinks, queries, first_row;
};

// The scores of one tile, [token][row]; `keys`, of which `count` are there, are those of the tile.
template <int D, int ROWS, typename T>
METAL_FUNC void score_full(
    device const T* keys, int count, threadgroup const float* q, threadgroup float* scores,
    int lane) {
  const int part = lane % 8;
  for (int i = lane / 8; i < FULL_TILE; i += 4) {
    float products[ROWS] = {0};
    if (i < count) {
      for (int c = 4 * part; c < D; c += 32) {
        float x[4], y[4];
        load_wide<4>(keys + i * D + c, x);
        UNROLL
        for (int r = 0; r < ROWS; r++) {
          load_rows<4>(q + r * D + c, y);
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
        scores[i * ROWS + r] = products[r];
      }
    }
  }
}

// Scores of the token in `slot` become weights; `limits`: what each row sees.
template <int ROWS>
METAL_FUNC void weigh_full(
    thread const FullSlots& slots, int slot, threadgroup const int* limits,
    threadgroup float* own, thread Softmax<ROWS>& softmax, thread float (&shrink)[ROWS]) {
  float weights[1][ROWS];
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    int oldest = limits[r * 4 + (slot < slots.sinks ? 0 : 3)];
    int newest = slots.count - slots.queries + (slots.first_row + r) % slots.queries;
    bool seen = slot >= oldest && slot <= newest;
    weights[0][r] = seen ? own[r] : MASKED;
  }
  softmax.template add<1>(weights, shrink);
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    own[r] = weights[0][r];
  }
}

// Adds the first `count` values of a tile, times their weights.
template <int D, int ROWS, int CHANNELS, typename T>
METAL_FUNC void add_full(
    device const T* values, int count, threadgroup const float* weights, int lane,
    thread float (&sums)[ROWS][CHANNELS]) {
  constexpr int WIDE = FullLayout<D>::WIDE;
  for (int i = 0; i < count; i++) {
    float weight[ROWS];
    load_rows<ROWS>(weights + i * ROWS, weight);
    UNROLL
    for (int j = 0; j < FullLayout<D>::LOADS; j++) {
      int c = (32 * j + lane) * WIDE;
      if (c < D) {
        float x[WIDE];
        load_wide<WIDE>(values + i * D + c, x);
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
}

// The tiles of a simdgroup, from the token `start` on and `step` apart. q: [row][channel].
template <int DK, int DV, int ROWS, int CHANNELS, typename T>
METAL_FUNC void attend_full(
    device const T* keys, device const T* values, thread const FullSlots& slots, int start,
    int step, threadgroup const float* q, threadgroup const int* limits,
    threadgroup float* scratch, int lane, thread Softmax<ROWS>& softmax,
    thread float (&sums)[ROWS][CHANNELS]) {
  for (; start < slots.count; start += step) {
    const int count = min(FULL_TILE, slots.count - start);
    score_full<DK, ROWS>(keys + start * DK, count, q, scratch, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    float shrink[ROWS];
    weigh_full<ROWS>(slots, start + lane, limits, scratch + lane * ROWS, softmax, shrink);
    shrink_sums(shrink, sums);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    add_full<DV>(values + start * DV, count, scratch, lane, sums);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// A lane's sums, to [row][channel].
template <int D, int ROWS, int CHANNELS>
METAL_FUNC void store_full(
    thread const float (&sums)[ROWS][CHANNELS], threadgroup float* to, int lane) {
  constexpr int WIDE = FullLayout<D>::WIDE;
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    UNROLL
    for (int j = 0; j < FullLayout<D>::LOADS; j++) {
      UNROLL
      for (int k = 0; k < WIDE; k++) {
        int c = (32 * j + lane) * WIDE + k;
        if (c < D) {
          to[r * D + c] = sums[r][j * WIDE + k];
        }
      }
    }
  }
}
