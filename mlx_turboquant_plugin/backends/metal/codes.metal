// What the kernels share: rotations, the key bias, and what codes stand for.
//
// SEGMENTS is 2 where vectors are cut in two halves, which are rotated and scaled each by
// itself, see codecs/segmented.py. SORTED: then each head has an order of its channels, and bits,
// of its own.

#ifndef UNROLL
#define UNROLL _Pragma("clang loop unroll(full)")
// A loop that is to be one in the machine code of other compilers, too.
#define ROLLED
#endif

// Scores of tokens that a row does not see. Finite, since kernels may be compiled as if
// there were no infinities.
constant constexpr float MASKED = -1e30f;

// The orthonormal Walsh-Hadamard transform of order D, a power of two. Element 32 * j + lane
// is x[j] of that lane; every lane of the simdgroup must take part.
template <int D, int COUNT>
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
  const float norm = rsqrt(float(D));
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    UNROLL
    for (ushort step = 1; step < (D < 32 ? D : 32); step *= 2) {
      float other = simd_shuffle_xor(x[j], step);
      x[j] = (lane & step) ? other - x[j] : x[j] + other;
    }
    x[j] *= norm;
  }
}

// The product of a simdgroup's vector, laid out as above, with a matrix (D, D). `scratch`: D
// numbers of the simdgroup's own.
template <int D, int COUNT>
METAL_FUNC void multiply_matrix(
    thread float (&y)[COUNT], device const float* matrix, threadgroup float* scratch, int lane) {
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
      y[j] += scratch[i] * matrix[i * D + c];
    }
  }
  // Before the next vector is written.
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// A simdgroup's vector times the signs of its channels.
template <int D, int COUNT>
METAL_FUNC void multiply_signs(thread float (&y)[COUNT], device const float* signs, int lane) {
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    y[j] *= 32 * j + lane < D ? signs[32 * j + lane] : 0.0f;
  }
}

// Four neighbouring bytes, of which `count` are there. They start at a multiple of four
// bytes if `aligned`.
METAL_FUNC uint load_four(device const uint8_t* from, int count, bool aligned) {
  if (aligned && count >= 4) {
    return *(device const uint*)from;
  }
  uint word = 0;
  UNROLL
  for (int i = 0; i < 4; i++) {
    word |= i < count ? uint(from[i]) << (8 * i) : 0;
  }
  return word;
}

// The size that a scale byte stands for.
METAL_FUNC float size_of(uint scale) {
  return fast::exp2(float(scale) * (1.0f / STEPS_PER_OCTAVE) + LOWEST_OCTAVE);
}

// Cosine and sine of the angle of rotary pair f, of `pairs`, at a position: see RotaryTable
// in codecs/key_bias.py; `fine` is (2 pairs, ANGLES), channel-major.
METAL_FUNC float2 angle(
    device const float* coarse_cos,
    device const float* coarse_sin,
    device const float* fine,
    int pairs,
    int f,
    int position) {
  const int block = position / ANGLES * pairs + f, within = position % ANGLES;
  const float cos1 = coarse_cos[block], sin1 = coarse_sin[block];
  const float cos2 = fine[f * ANGLES + within], sin2 = fine[(pairs + f) * ANGLES + within];
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
  // A division by a number that is not known takes twenty instructions.
  const int first = second ? other : c, f = between == 2 ? first / 2 : first;
  const float2 turn = angle(coarse_cos, coarse_sin, fine, pairs, f, position);
  return bias[c] * turn.x + bias[other] * (second ? turn.y : -turn.y);
}

// The arrays of packed codes: one, or three for 3 bits.
struct Planes {
  device const uint8_t* low;
  device const uint8_t* low_of_upper_fields;
  device const uint8_t* high;
};

// What a byte of codes, or of their low bits, holds.
template <int BITS>
struct Fields {
  static constant constexpr const int COUNT = BITS == 3 ? 8 : 8 / BITS;

  static uint code(uint byte, int field) { return (byte >> (BITS * field)) & ((1 << BITS) - 1); }
};

// The level of a code.
template <bool AFFINE>
METAL_FUNC float level(threadgroup const float* levels, uint code) {
  return AFFINE ? float(code) : levels[code];
}

// The bits of the first segment of a KV head: all eight where there is no second one. Unsorted
// heads have those that `layout` begins with.
template <int D, int SEGMENTS, bool SORTED>
METAL_FUNC int first_bits_of(device const int* layout, int kv_head) {
  return SEGMENTS == 1 ? 8 : layout[SORTED ? kv_head * (D + 1) + D : 0];
}

// The place in `levels` of what a step of a segment's levels stands for at size 1.
constant constexpr int WIDTH = 0;

// Levels of two segments whose codes share a byte, the first above the second. A level begins
// with the code and goes on with a one and zeros.
struct SegmentLevels {
  int first_bits;
  uint mask[2], middle[2];

  explicit SegmentLevels(int bits_of_first) : first_bits(bits_of_first) {
    UNROLL
    for (int s = 0; s < 2; s++) {
      const int bits = s == 0 ? first_bits : 8 - first_bits;
      mask[s] = 0x01010101u * (256u - (256u >> bits));
      middle[s] = 0x01010101u * (128u >> bits);
    }
  }

  // Of four bytes of codes, as bytes.
  uint four(uint codes, int segment) const {
    // Segments may be known only at run time: arrays with such an index are not in registers.
    const bool first = segment == 0;
    return ((first ? codes : codes << first_bits) & (first ? mask[0] : mask[1])) |
        (first ? middle[0] : middle[1]);
  }
};

// Level k of four.
METAL_FUNC float segment_level(uint four, int k) {
  return float((four >> (8 * k)) & 255) - OFFSET;
}

// How the codes of a vector lie in threadgroup memory: its bytes, plane after plane. GROUPED:
// as mx.quantize packs them, by groups of channels that have a scale and a zero point each.
template <int D, int BITS, int CUT, bool GROUPED>
struct StoredVector {
  using Byte = Fields<BITS>;
  static constant constexpr const int DIM = D;
  static constant constexpr const int SEGMENTS = CUT;
  static constant constexpr const int SEGMENT = D / CUT;
  // Channels that share a scale.
  static constant constexpr const int GROUP = GROUPED ? (D % 64 == 0 ? 64 : 32) : SEGMENT;
  static constant constexpr const int SCALES = (D + GROUP - 1) / GROUP;
  static constant constexpr const int PLANES = BITS == 3 && !GROUPED ? 3 : 1;
  // Of a plane.
  static constant constexpr const int BYTES = GROUPED ? SCALES * GROUP * BITS / 8 : D / Byte::COUNT;
  // Vectors start in other banks of memory than their neighbours.
  static constant constexpr const int PITCH = PLANES * BYTES + 4;

  // The code of channel c of the only segment.
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
    return Byte::code(bytes[byte], field);
  }
};
