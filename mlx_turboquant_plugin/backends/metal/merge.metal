// The attention from the partial sums of its splits: one threadgroup of four simdgroups
// for each query row. The sums over codes are rotated back. A learned sink is one more score,
// without a value.
//
// Inputs: what decode.metal makes and, as the fourth if any, the learned sinks (H_q,).
// Output: (B, H_q, N, DV).
constexpr bool FAST_ROTATION = (DV & (DV - 1)) == 0;
constexpr int COUNT = (DV + 31) / 32;

threadgroup float full_sums[SIMDS * DV];
threadgroup float quantized_sums[SIMDS * DV];

const int thread_index = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int row = threadgroup_position_in_grid.x;
const int kv_index = threadgroup_position_in_grid.y;
const int rows = threadgroups_per_grid.x;

const int row_blocks = partial_shape[1];
const int splits = partial_shape[2];
const device float* own =
    partial + (size_t(kv_index * row_blocks + row / ROWS) * splits * ROWS + row % ROWS) * (DV + 2);
const int stride = ROWS * (DV + 2);

float learned = MASKED;
#if INPUTS == 4
const int group = rows / sizes[4];
const int query_head = kv_index % (learned_sinks_shape[0] / group) * group + row / sizes[4];
learned = float(learned_sinks[query_head]) * LOG2_E;
#endif

const Norm norm = norm_of_splits<DV>(own, stride, splits, learned, lane);
float full[COUNT], quantized[COUNT];
sum_splits<DV>(own, stride, splits, sizes[2], norm, simd, lane, full, quantized);
for (int j = 0; j < COUNT; j++) {
  int c = 32 * j + lane;
  if (c < DV) {
    full_sums[simd * DV + c] = full[j];
    quantized_sums[simd * DV + c] = quantized[j];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const size_t out_offset = size_t(kv_index * rows + row) * DV;
if (FAST_ROTATION) {
  if (simd == 0) {
    for (int j = 0; j < COUNT; j++) {
      int c = 32 * j + lane;
      full[j] = quantized[j] = 0;
      for (int s = 0; s < SIMDS && c < DV; s++) {
        full[j] += full_sums[s * DV + c];
        quantized[j] += quantized_sums[s * DV + c];
      }
    }
    walsh_hadamard<DV>(quantized, lane);
    for (int j = 0; j < COUNT; j++) {
      int c = 32 * j + lane;
      if (c < DV) {
        out[out_offset + c] = static_cast<T>(full[j] + quantized[j] * value_rotation[c]);
      }
    }
  }
} else {
  for (int c = thread_index; c < DV; c += THREADS) {
    float y = 0;
    for (int s = 0; s < SIMDS; s++) {
      y += full_sums[s * DV + c];
      for (int i = 0; i < DV; i++) {
        y += quantized_sums[s * DV + i] * value_rotation[i * DV + c];
      }
    }
    out[out_offset + c] = static_cast<T>(y);
  }
}
