// Codes of vectors, as codecs/kv_codec.py makes them: the key bias taken away, divided by the
// balance, sorted, rotated, quantized and packed; Lloyd-Max ones or those of two segments. One
// threadgroup of four simdgroups for each (32 tokens, KV head of a sequence); the simdgroups
// take vectors in turns.
//
// Input: x (B, H, T, D). Outputs: planes of codes and at last scales, (B, H, bytes, T) if
// CHANNEL_MAJOR and (B, H, T, bytes) otherwise, for one segment.
constexpr int SEGMENT = D / SEGMENTS;
constexpr bool FAST_ROTATION = (SEGMENT & (SEGMENT - 1)) == 0;
constexpr int COUNT = (SEGMENT + 31) / 32;
using Byte = Fields<BITS>;
constexpr int BYTES = D / Byte::COUNT;

threadgroup uint8_t codes[ENCODED * D];
threadgroup float all_scratch[FAST_ROTATION ? 1 : SIMDS * SEGMENT];

const int thread_index = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
threadgroup float* scratch = all_scratch + (FAST_ROTATION ? 0 : simd * SEGMENT);
const int first = threadgroup_position_in_grid.x * ENCODED;
const int kv_index = threadgroup_position_in_grid.y;
const int kv_head = kv_index % x_shape[1];
const int length = x_shape[2];
const int count = min(ENCODED, length - first);
const size_t first_vector = size_t(kv_index) * length + first;
const int start = places[0];
const Known known = {
    balance + kv_head * D, bias + kv_head * D, fine, coarse_cos, coarse_sin,
    layout + kv_head * (D + 1), places[1], places[2], places[3]};
const int first_bits = first_bits_of<D, SEGMENTS, SORTED>(layout, kv_head);
// Of the only segment.
const LloydMax<BITS> quantizer(levels);

for (int token = simd; token < count; token += SIMDS) {
  UNROLL
  for (int s = 0; s < SEGMENTS; s++) {
    float y[COUNT];
    read_segment<SEGMENT, BALANCED, SORTED, BIASED>(
        x + (first_vector + token) * D, known, s * SEGMENT, start + first + token, lane, y);
    rotate_vector<SEGMENT>(y, rotation, scratch, lane);
    threadgroup uint8_t* own_codes = codes + token * D + s * SEGMENT;
    const int bits = s == 0 ? first_bits : 8 - first_bits;
    // The shift of so many bits is in their place among the levels.
    int scale;
    if (SEGMENTS == 1) {
      scale = searched<SEGMENT>(y, quantizer, 0.0f, lane);
      round_channels<SEGMENT>(y, size_of(scale), quantizer, own_codes, lane);
    } else {
      const Uniform uniform(levels, bits);
      scale = searched<SEGMENT>(y, uniform, levels[bits], lane);
      if (FED_BACK) {
        round_with_feedback<SEGMENT>(
            y, size_of(scale), uniform,
            feedback + (kv_head * SEGMENTS + s) * SEGMENT * SEGMENT, own_codes, lane);
      } else {
        round_channels<SEGMENT>(y, size_of(scale), uniform, own_codes, lane);
      }
    }
    if (lane == 0) {
      scales[(size_t(kv_index) * SEGMENTS + s) * length + first + token] = scale;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Neighbouring threads write neighbouring bytes.
for (int i = thread_index; i < ENCODED * BYTES; i += THREADS) {
  const int token = CHANNEL_MAJOR ? i % ENCODED : i / BYTES;
  const int byte = CHANNEL_MAJOR ? i / ENCODED : i % BYTES;
  if (token < count) {
    threadgroup const uint8_t* fields = codes + token * D + byte;
    const size_t at = CHANNEL_MAJOR
        ? (size_t(kv_index) * BYTES + byte) * length + first + token
        : (first_vector + token) * BYTES + byte;
    uint packed = 0;
#if OUTPUTS == 4
    uint high_bits = 0;
    for (int field = 0; field < Byte::COUNT; field++) {
      packed |= (fields[field * BYTES] & 3u) << (2 * field);
      high_bits |= (fields[field * BYTES] >> 2u) << field;
    }
    low_of_upper_fields[at] = packed >> 8;
    high[at] = high_bits;
#else
    for (int field = 0; field < Byte::COUNT; field++) {
      const int segment_shift = field == 0 ? 8 - first_bits : 0;
      packed |= uint(fields[field * BYTES]) << (SEGMENTS == 1 ? BITS * field : segment_shift);
    }
#endif
    low[at] = packed & 255;
  }
}
