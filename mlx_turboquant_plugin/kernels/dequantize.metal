// Keys or values of one layer side by side, as MLX's own attention takes them: the sinks,
// tokens from their codes, then exact ones, with zeros before and after. Codes become
// levels, are rotated back, multiplied by the balance, and get the key bias.
//
// A threadgroup serves 64 tokens of one (sequence, KV head): the first ones tiles of codes,
// aligned to multiples of 64, the others all other tokens. Output: (B, H, T, D).
constexpr int SIMDS = 8;
constexpr int THREADS = 32 * SIMDS;
constexpr int TOKENS = 64;
constexpr bool FAST_ROTATION = (D & (D - 1)) == 0;
constexpr int COUNT = (D + 31) / 32;
using Stored = StoredVector<D, BITS, GROUPED>;

threadgroup uint8_t tile[TOKENS * Stored::PITCH];
threadgroup float known_levels[16];
threadgroup float all_scratch[FAST_ROTATION ? 1 : SIMDS * D];

const int thread_index = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int kv_index = threadgroup_position_in_grid.y;
const int kv_head = kv_index % older_shape[1];
// T; zeros before; sinks; codes: the first that counts, how many do, how many there are;
// exact tokens: of the older ones, the place of the first that counts, and how many do.
const int total = places[0], left = places[1], sinks = places[2];
const int first = places[3], decoded = places[4], coded = places[5];
const int older_count = places[6], exact_first = places[7], exact = places[8];
const int start = places[9];
const int rotary = places[10], between = places[11], distance = places[12];
const int first_tile = first / TOKENS;
const int tiles = decoded == 0 ? 0 : (first + decoded - 1) / TOKENS - first_tile + 1;
const int group = threadgroup_position_in_grid.x;
const size_t out_offset = size_t(kv_index) * total * D;

if (group < tiles) {
  const int begin = (first_tile + group) * TOKENS;
  const int count = min(TOKENS, coded - begin);
  UNROLL
  for (int p = 0; p < Stored::PLANES; p++) {
    // Those of mx.quantize are words.
    device const uint8_t* plane =
        (device const uint8_t*)(p == 0 ? low : p == 1 ? low_of_upper_fields : high);
    if (CHANNEL_MAJOR) {
      constexpr int WORDS = TOKENS / 4;
      for (int i = thread_index; i < Stored::BYTES * WORDS; i += THREADS) {
        const int row = i / WORDS, token = i % WORDS * 4;
        const size_t at = (size_t(kv_index) * Stored::BYTES + row) * coded + begin + token;
        const uint four = load_four(plane + at, count - token, coded % 4 == 0);
        UNROLL
        for (int k = 0; k < 4; k++) {
          tile[(token + k) * Stored::PITCH + p * Stored::BYTES + row] = (four >> (8 * k)) & 255;
        }
      }
    } else {
      const size_t at = (size_t(kv_index) * coded + begin) * Stored::BYTES;
      for (int i = thread_index; i < count * Stored::BYTES; i += THREADS) {
        const int token = i / Stored::BYTES;
        tile[token * Stored::PITCH + p * Stored::BYTES + i % Stored::BYTES] = plane[at + i];
      }
    }
  }
  if (thread_index < 16) {
    known_levels[thread_index] = levels[thread_index];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int token = simd; token < count; token += SIMDS) {
    const int index = begin + token;
    if (index < first || index >= first + decoded) {
      continue;
    }
    threadgroup const uint8_t* codes = tile + token * Stored::PITCH;
    const size_t vector = size_t(kv_index) * coded + index;
    // Channel 32 * j + lane is y[j].
    float y[COUNT];
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      const int c = 32 * j + lane;
      y[j] = 0;
      if (c < D) {
        const uint code = Stored::code(codes, c);
        if (AFFINE) {
          const size_t at = vector * Stored::SCALES + c / Stored::GROUP;
          y[j] = float(code) * float(scales[at]) + float(zeros[at]);
        } else {
          y[j] = known_levels[code] * size_of(uint(scales[vector]));
        }
      }
    }
    if (FAST_ROTATION) {
      walsh_hadamard<COUNT>(y, lane);
      UNROLL
      for (int j = 0; j < COUNT; j++) {
        y[j] *= rotation[32 * j + lane];
      }
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
    const size_t to = out_offset + size_t(left + sinks + index - first) * D;
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      const int c = 32 * j + lane;
      if (c < D) {
        if (BALANCED) {
          y[j] *= balance[kv_head * D + c];
        }
        if (BIASED) {
          y[j] += rotated_bias(
              bias + kv_head * D, coarse_cos, coarse_sin, fine, rotary, between, distance, c,
              start + index);
        }
        out[to + c] = static_cast<T>(y[j]);
      }
    }
  }
} else {
  const int begin = (group - tiles) * TOKENS;
  const int count = min(TOKENS, total - decoded - begin);
  for (int i = thread_index; i < count * D; i += THREADS) {
    const int token = begin + i / D, c = i % D;
    const int place = token < left + sinks ? token : token + decoded;
    int slot = token - left;
    if (slot >= sinks) {
      slot = slot - sinks < exact ? slot - sinks + exact_first : -1;
    }
    float x = 0;
    if (slot >= older_count) {
      const size_t at = size_t(kv_index) * newer_shape[2] + slot - older_count;
      x = float(newer[at * D + c]);
    } else if (slot >= 0) {
      x = float(older[(size_t(kv_index) * older_count + slot) * D + c]);
    }
    out[out_offset + size_t(place) * D + c] = static_cast<T>(x);
  }
}
