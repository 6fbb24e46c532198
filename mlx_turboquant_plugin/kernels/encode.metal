// Lloyd-Max codes of vectors, as codecs/kv_codec.py makes them: the key bias taken away,
// divided by the balance, rotated, quantised and packed. One threadgroup of four simdgroups
// for each (32 tokens, KV head of a sequence); the simdgroups take vectors in turns.
//
// Input: x (B, H, T, D). Outputs: planes of codes and at last scales, (B, H, bytes, T) if
// CHANNEL_MAJOR and (B, H, T, bytes) otherwise.
constexpr int SIMDS = 4;
constexpr int THREADS = 32 * SIMDS;
constexpr int TOKENS = 32;
constexpr bool FAST_ROTATION = (D & (D - 1)) == 0;
constexpr int COUNT = (D + 31) / 32;
constexpr int HALF = 1 << (BITS - 1);
constexpr int FIELDS = BITS == 3 ? 8 : 8 / BITS;
constexpr int BYTES = D / FIELDS;

threadgroup uint8_t codes[TOKENS * D];
threadgroup float all_scratch[FAST_ROTATION ? 1 : SIMDS * D];

const int thread_index = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int first = threadgroup_position_in_grid.x * TOKENS;
const int kv_index = threadgroup_position_in_grid.y;
const int kv_head = kv_index % x_shape[1];
const int length = x_shape[2];
const int count = min(TOKENS, length - first);
const size_t first_vector = size_t(kv_index) * length + first;
const int start = places[0];
const int rotary = places[1], between = places[2], distance = places[3];

// The positive levels, and the thresholds half-way between them.
float positive[HALF], threshold[HALF - 1];
UNROLL
for (int m = 0; m < HALF; m++) {
  positive[m] = levels[HALF + m];
}
UNROLL
for (int m = 0; m < HALF - 1; m++) {
  threshold[m] = 0.5f * (positive[m] + positive[m + 1]);
}

for (int token = simd; token < count; token += SIMDS) {
  // Channel 32 * j + lane is y[j]; those beyond the last are zero.
  float y[COUNT];
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    const int c = 32 * j + lane;
    y[j] = 0;
    if (c < D) {
      y[j] = float(x[(first_vector + token) * D + c]);
      if (BIASED) {
        y[j] -= rotated_bias(
            bias + kv_head * D, coarse_cos, coarse_sin, fine, rotary, between, distance, c,
            start + first + token);
      }
      if (BALANCED) {
        y[j] /= balance[kv_head * D + c];
      }
      if (FAST_ROTATION) {
        y[j] *= rotation[c];
      }
    }
  }
  if (FAST_ROTATION) {
    walsh_hadamard<COUNT>(y, lane);
  } else {
    threadgroup float* scratch = all_scratch + simd * D;
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      if (32 * j + lane < D) {
        scratch[32 * j + lane] = y[j];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      const int c = 32 * j + lane;
      y[j] = 0;
      for (int i = 0; i < D && c < D; i++) {
        y[j] += scratch[i] * rotation[i * D + c];
      }
    }
    // Before the next vector is written.
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  // The size near the root mean square that loses least.
  float square = 0;
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    square += y[j] * y[j];
  }
  const float rms = max(sqrt(simd_sum(square) / D), 1e-20f);
  const float norm = rms * sqrt(float(D));
  const int nearest = int(clamp(rint((log2(rms) + 13.0f) * 12.0f), -2.0f, 257.0f));
  float least = 0;
  int scale = 0;
  for (int k = 0; k < SEARCHED; k++) {
    // 0, -1, 1, -2, 2
    const int tried = clamp(nearest + (k % 2 ? -(k + 1) / 2 : k / 2), 0, 255);
    const float size = size_of(tried);
    float across = 0, along = 0;
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      const float magnitude = fabs(y[j]);
      float coded = positive[0];
      UNROLL
      for (int m = 0; m < HALF - 1; m++) {
        coded = magnitude > threshold[m] * size ? positive[m + 1] : coded;
      }
      const float missing = 32 * j + lane < D ? magnitude - coded * size : 0.0f;
      across += missing * missing;
      along += missing * magnitude;
    }
    across = simd_sum(across);
    along = simd_sum(along) / norm;
    const float loss = across + ALONG * along * along;
    if (k == 0 || loss < least) {
      least = loss;
      scale = tried;
    }
  }

  const float size = size_of(scale);
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    int above = 0;
    UNROLL
    for (int m = 0; m < HALF - 1; m++) {
      above += fabs(y[j]) > threshold[m] * size;
    }
    if (32 * j + lane < D) {
      codes[token * D + 32 * j + lane] = y[j] < 0 ? HALF - 1 - above : HALF + above;
    }
  }
  if (lane == 0) {
    scales[first_vector + token] = scale;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Neighbouring threads write neighbouring bytes.
for (int i = thread_index; i < TOKENS * BYTES; i += THREADS) {
  const int token = CHANNEL_MAJOR ? i % TOKENS : i / BYTES;
  const int byte = CHANNEL_MAJOR ? i / TOKENS : i % BYTES;
  if (token < count) {
    threadgroup const uint8_t* fields = codes + token * D + byte;
    const size_t at = CHANNEL_MAJOR
        ? (size_t(kv_index) * BYTES + byte) * length + first + token
        : (first_vector + token) * BYTES + byte;
    uint packed = 0;
#if OUTPUTS == 4
    uint high_bits = 0;
    for (int field = 0; field < FIELDS; field++) {
      packed |= (fields[field * BYTES] & 3u) << (2 * field);
      high_bits |= (fields[field * BYTES] >> 2u) << field;
    }
    low_of_upper_fields[at] = packed >> 8;
    high[at] = high_bits;
#else
    for (int field = 0; field < FIELDS; field++) {
      packed |= uint(fields[field * BYTES]) << (BITS * field);
    }
#endif
    low[at] = packed & 255;
  }
}
