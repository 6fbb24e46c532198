// What merge.metal does with the splits of one query row. `own`: the row in the first of them,
// (DV + 2,), see decode.metal; that in the next is `stride` further.

// The highest score of a row, and one over the total of weights relative to it.
struct Norm {
  float top, inverse;
};

// `learned`: the score of a learned sink, or MASKED.
template <int DV>
METAL_FUNC Norm norm_of_splits(
    device const float* own, int stride, int splits, float learned, int lane) {
  float top = MASKED;
  for (int s = lane; s < splits; s += 32) {
    top = max(top, own[s * stride + DV]);
  }
  top = max(simd_max(top), learned);
  float total = 0;
  for (int s = lane; s < splits; s += 32) {
    total += fast::exp2(own[s * stride + DV] - top) * own[s * stride + DV + 1];
  }
  // A row that sees nothing gives zeros.
  return {top, 1 / (simd_sum(total) + fast::exp2(learned - top))};
}

// A simdgroup's share of the sums, of full-precision tokens and of codes; channel 32 j + lane is
// number j.
template <int DV, int COUNT>
METAL_FUNC void sum_splits(
    device const float* own, int stride, int splits, int full_splits, Norm norm, int simd,
    int lane, thread float (&full)[COUNT], thread float (&quantized)[COUNT]) {
  for (int j = 0; j < COUNT; j++) {
    full[j] = quantized[j] = 0;
  }
  for (int s = simd; s < splits; s += SIMDS) {
    float share = fast::exp2(own[s * stride + DV] - norm.top) * norm.inverse;
    for (int j = 0; j < COUNT; j++) {
      int c = 32 * j + lane;
      float x = c < DV ? own[s * stride + c] * share : 0.0f;
      full[j] += s < full_splits ? x : 0.0f;
      quantized[j] += s < full_splits ? 0.0f : x;
    }
  }
}
