// What the kernels share: rotations, and products with packed codes.
//
// ROWS is the number of query rows (pairs of a query head and a position) that a
// threadgroup serves: 1, 2, 4 or 8. Rows lie side by side in threadgroup memory, so that
// one load serves a channel or a token for all of them.

#ifndef UNROLL
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

// Scores of tokens that a row does not see. Finite, since kernels may be compiled as if
// there were no infinities.
constant constexpr float MASKED = -1e30f;

// A position that no sequence reaches.
constant constexpr int NEVER = 0x7fffffff;

// Tokens of a tile of codes, four for each lane, and of a tile of exact tokens.
constant constexpr int TILE = 128;
constant constexpr int EXACT_TILE = 32;

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

// The orthonormal Walsh-Hadamard transform of order 32 * COUNT. Element 32 * j + lane is
// x[j] of that lane; every lane of the simdgroup must take part.
template <int COUNT>
METAL_FUNC void walsh_hadamard(thread float (&x)[COUNT], uint lane) {
  UNROLL
  for (int step = 1; step < COUNT; step *= 2) {
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      if ((j & step) == 0) {
        float low = x[j], high = x[j + step];
        x[j] = low + high;
        x[j + step] = low - high;
      }
    }
  }
  const float norm = rsqrt(32.0f * COUNT);
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    UNROLL
    for (ushort step = 1; step < 32; step *= 2) {
      float other = simd_shuffle_xor(x[j], step);
      x[j] = (lane & step) ? other - x[j] : x[j] + other;
    }
    x[j] *= norm;
  }
}

// Four neighbouring bytes, of which `count` are there. They start at a multiple of four
// bytes if `aligned`.
METAL_FUNC uint load_four(device const uint8_t* from, int count, bool aligned) {
  if (aligned && count >= 4) {
    return *(device const uint*)from;
  }
  uint word = 0;
  for (int i = 0; i < min(count, 4); i++) {
    word |= uint(from[i]) << (8 * i);
  }
  return word;
}

// The size that a scale byte stands for: 12 steps to the octave from 2^-13 on.
METAL_FUNC float size_of(uint scale) {
  return fast::exp2(float(scale) * (1.0f / 12.0f) - 13.0f);
}

// Cosine and sine of the angle of rotary pair f, of `pairs`, at a position: see RotaryTable
// in codecs/key_bias.py; `fine` is (2 pairs, TILE), channel-major.
METAL_FUNC float2 angle(
    device const float* coarse_cos,
    device const float* coarse_sin,
    device const float* fine,
    int pairs,
    int f,
    int position) {
  const int block = position / TILE * pairs + f, within = position % TILE;
  const float cos1 = coarse_cos[block], sin1 = coarse_sin[block];
  const float cos2 = fine[f * TILE + within], sin2 = fine[(pairs + f) * TILE + within];
  return float2(cos1 * cos2 - sin1 * sin2, sin1 * cos2 + cos1 * sin2);
}

// Channel c of a key bias, turned to a position. The rotary pairs are `pairs`; those
// channels that are first ones lie `between` apart, and the two of a pair `distance`.
METAL_FUNC float rotated_bias(
    device const float* bias,
    device const float* coarse_cos,
    device const float* coarse_sin,
    device const float* fine,
    int pairs,
    int between,
    int distance,
    int c,
    int position) {
  if (c >= 2 * pairs) {
    return bias[c];
  }
  const bool second = distance == 1 ? c % 2 == 1 : c >= distance;
  const int other = second ? c - distance : c + distance;
  const int f = (second ? other : c) / between;
  const float2 turn = angle(coarse_cos, coarse_sin, fine, pairs, f, position);
  return bias[c] * turn.x + bias[other] * (second ? turn.y : -turn.y);
}

// The arrays of packed codes: one, or three for 3 bits.
struct Planes {
  device const uint8_t* low;
  device const uint8_t* low_of_upper_fields;
  device const uint8_t* high;
};

template <bool AFFINE>
METAL_FUNC float level(threadgroup const float* levels, uint code) {
  return AFFINE ? float(code) : levels[code];
}

// Products of all rows with four neighbouring channel-major vectors, of which `count`
// are there: products[k][r] = sum over c of queries[c][r] * level of channel c of vector k.
//   planes: of the first of these vectors; byte i of a vector is `stride` * i further.
template <int D, int BITS, bool AFFINE, int ROWS>
METAL_FUNC void multiply_keys(
    threadgroup const float* queries,
    threadgroup const float* levels,
    Planes planes,
    int stride,
    int count,
    thread float (&products)[4][ROWS]) {
  constexpr int FIELDS = BITS == 3 ? 8 : 8 / BITS;
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
        float q[ROWS];
        load_rows<ROWS>(queries + (field * BYTES + start + d) * ROWS, q);
        UNROLL
        for (int k = 0; k < 4; k++) {
          uint code;
          if (BITS == 3) {
            code = ((field < 4 ? low[d] : upper[d]) >> (8 * k + 2 * (field % 4))) & 3;
            code |= ((high[d] >> (8 * k + field)) & 1) << 2;
          } else {
            code = (low[d] >> (8 * k + BITS * field)) & ((1 << BITS) - 1);
          }
          float x = level<AFFINE>(levels, code);
          UNROLL
          for (int r = 0; r < ROWS; r++) {
            products[k][r] += q[r] * x;
          }
        }
      }
    }
  }
}

// How the codes of a vector lie in threadgroup memory: its bytes, plane after plane. GROUPED:
// as mx.quantize packs them, by groups of channels that have a scale and a zero point each.
template <int D, int BITS, bool GROUPED>
struct StoredVector {
  static constant constexpr const int FIELDS = BITS == 3 ? 8 : 8 / BITS;
  static constant constexpr const int GROUP = GROUPED ? (D % 64 == 0 ? 64 : 32) : D;
  static constant constexpr const int SCALES = (D + GROUP - 1) / GROUP;
  static constant constexpr const int PLANES = BITS == 3 && !GROUPED ? 3 : 1;
  // Of a plane.
  static constant constexpr const int BYTES = GROUPED ? SCALES * GROUP * BITS / 8 : D / FIELDS;
  // Vectors start in other banks of memory than their neighbours.
  static constant constexpr const int PITCH = PLANES * BYTES + 4;

  // The code of channel c.
  static uint code(threadgroup const uint8_t* bytes, int c) {
    if (GROUPED) {
      const int byte = c * BITS / 8, shift = c * BITS % 8;
      // A code of 3 bits can begin in one byte and end in the next.
      const uint next = shift + BITS > 8 ? bytes[byte + 1] : 0;
      return ((bytes[byte] | next << 8) >> shift) & ((1 << BITS) - 1);
    }
    const int field = c / BYTES, byte = c % BYTES;
    if (BITS == 3) {
      const uint low_bits = bytes[field < 4 ? byte : BYTES + byte] >> (2 * (field % 4));
      return (low_bits & 3) | ((bytes[2 * BYTES + byte] >> field) & 1) << 2;
    }
    return (bytes[byte] >> (BITS * field)) & ((1 << BITS) - 1);
  }
};

// How the channels of token-major values are dealt to the lanes of a simdgroup.
//
// A unit is what one byte of low bits holds: FIELDS channels. A lane owns UNITS
// neighbouring units, if there are so many. Three bits of the affine codec are twelve bits
// at a time.
template <int D, int BITS, bool AFFINE>
struct ValueLayout {
  static constant constexpr const int FIELDS = BITS == 3 ? 4 : 8 / BITS;
  static constant constexpr const int ALL = D / FIELDS;
  static constant constexpr const int UNITS = ALL <= 32 ? 1 : ALL <= 64 ? 2 : ALL <= 128 ? 4 : 8;
  static constant constexpr const int CHANNELS = UNITS * FIELDS;
  // Bytes of a plane of one token; the affine codec pads to whole groups.
  static constant constexpr const int GROUP = D % 64 == 0 ? 64 : 32;
  static constant constexpr const int GROUPS = (D + GROUP - 1) / GROUP;
  static constant constexpr const int BYTES =
      AFFINE ? GROUPS * GROUP * BITS / 8 : (BITS == 3 ? D / 8 : D / FIELDS);

  // The channel of field `field` of unit `unit`.
  static int channel(int unit, int field) {
    if (AFFINE) {
      return unit * FIELDS + field;
    }
    if (BITS == 3) {
      return (unit / BYTES * 4 + field) * BYTES + unit % BYTES;
    }
    return field * BYTES + unit;
  }
};

// The levels of a lane's channels of one token: x[FIELDS * u + field].
//   planes: of the token.
template <int D, int BITS, bool AFFINE, typename Scale, int CHANNELS>
METAL_FUNC void load_values(
    threadgroup const float* levels,
    Planes planes,
    device const Scale* scales,
    device const Scale* zeros,
    uint lane,
    thread float (&x)[CHANNELS]) {
  using Layout = ValueLayout<D, BITS, AFFINE>;
  const int first = lane * Layout::UNITS;
  UNROLL
  for (int k = 0; k < CHANNELS; k++) {
    x[k] = 0;
  }
  if (first >= Layout::ALL) {
    return;
  }
  uint codes[Layout::UNITS];
  if (BITS != 3) {
    if (Layout::UNITS == 1) {
      codes[0] = planes.low[first];
    } else if (Layout::UNITS == 2) {
      uint two = *(device const ushort*)(planes.low + first);
      UNROLL
      for (int u = 0; u < Layout::UNITS; u++) {
        codes[u] = (two >> (8 * u)) & 255;
      }
    } else {
      device const uint* words = (device const uint*)(planes.low + first);
      UNROLL
      for (int u = 0; u < Layout::UNITS; u++) {
        codes[u] = (words[u / 4] >> (8 * (u % 4))) & 255;
      }
    }
  } else {
    UNROLL
    for (int u = 0; u < Layout::UNITS; u++) {
      int unit = first + u;
      if (AFFINE) {
        int byte = unit / 2 * 3 + unit % 2;
        uint two = planes.low[byte] | uint(planes.low[byte + 1]) << 8;
        codes[u] = (two >> (4 * (unit % 2))) & 4095;
      } else {
        bool upper = unit >= Layout::BYTES;
        int i = upper ? unit - Layout::BYTES : unit;
        uint low = upper ? planes.low_of_upper_fields[i] : planes.low[i];
        // The high bits of the four fields, in the place above the low ones.
        codes[u] = low | ((uint(planes.high[i]) >> (upper ? 4 : 0)) & 15) << 8;
      }
    }
  }
  UNROLL
  for (int u = 0; u < Layout::UNITS; u++) {
    float scale = 1, zero = 0;
    if (AFFINE) {
      int group = (first + u) * Layout::FIELDS / Layout::GROUP;
      scale = float(scales[group]);
      zero = float(zeros[group]);
    }
    UNROLL
    for (int field = 0; field < Layout::FIELDS; field++) {
      uint code;
      if (BITS == 3 && !AFFINE) {
        code = ((codes[u] >> (2 * field)) & 3) | ((codes[u] >> (8 + field)) & 1) << 2;
      } else {
        code = (codes[u] >> (BITS * field)) & ((1 << BITS) - 1);
      }
      float value = level<AFFINE>(levels, code);
      x[u * Layout::FIELDS + field] = AFFINE ? value * scale + zero : value;
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
