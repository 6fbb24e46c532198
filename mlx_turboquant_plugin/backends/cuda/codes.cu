// Codes to levels, and levels to products. LEVELS and SEGMENTED are made from the codecs by
// source.py.
//
// A level is a signed byte and something more, a half where there are no segments. Products are
// sums of bytes, exact in int32, by mma.m16n8k32; queries and weights take part as 15 bits in two
// bytes, which fill two of the eight columns.

struct alignas(16) Words {
  unsigned x[4];
};

// The bits of `a` where `mask` is set, those of `b` elsewhere.
__device__ inline unsigned merge_bits(unsigned a, unsigned b, unsigned mask) {
  return (a & mask) | (b & ~mask);
}

__device__ inline unsigned rotate_left(unsigned x, int bits) {
  return __funnelshift_l(x, x, bits & 31);
}

// How codes of BITS bits lie in memory, see packing.py: the channels are FIELDS fields of
// ROWS channels, and a byte holds one channel of each field (of half of them in each of
// the first two planes of 3 bits).
//
// Codes are looked up eight at a time: a "nibble word" holds, in the two halves of each
// byte, the codes of the fields j and j + FIELDS / 2, and there are KINDS of these.
template <int DIM, int BITS>
struct Layout {
  static constexpr int PLANES = BITS == 3 ? 3 : 1;
  static constexpr int KINDS = BITS == 4 ? 1 : BITS == 3 ? 4 : 2;
  static constexpr int FIELDS = 2 * KINDS;
  static constexpr int ROWS = DIM / FIELDS;
  // 16 levels do not fit one lookup: two, whose levels add up.
  static constexpr int TABLES = BITS == 4 ? 2 : 1;
};

// The bits of codes of the first segment in head h; those of the second have the rest of the
// byte. Channels lie as those of 4 bits do. layout: that of KVCodec, (H, DIM + 1), or not read.
template <int DIM, bool SORTED>
__device__ inline int first_bits_of(const int* layout, int h) {
  return SORTED ? layout[h * (DIM + 1) + DIM] : SEGMENTED::usual_bits;
}

// What signed bytes stand for at size 1: (byte + offset) unit.
struct Bytes {
  float unit, offset;
};

// Nibble word `2 half + odd` (3 bits) or `half + odd` (2 bits) of bytes at the same place
// of all planes.
template <int BITS>
__device__ inline unsigned nibbles(const unsigned (&byte)[BITS == 3 ? 3 : 1], int half, int odd) {
  if constexpr (BITS == 4) {
    return byte[0];
  } else if constexpr (BITS == 2) {
    return (byte[0] >> (2 * (half + odd))) & 0x33333333u;
  } else {
    unsigned low = merge_bits(
        byte[0] >> (4 * half), rotate_left(byte[1], 4 - 4 * half), 0x0F0F0F0Fu);
    unsigned high = rotate_left(byte[2], 2 - 2 * half - odd);
    return ((low >> (2 * odd)) & 0x33333333u) | (high & 0x44444444u);
  }
}

// Halves of the tables of look_up(), in registers. The compiler would move constants there
// before each use, a tenth of all instructions, and so it would what is known to be the same
// for all threads: these are made with a `zero` that it does not know, by way of shared memory,
// where even and odd lanes have their own.
template <int BITS, int SEGMENTS = 1>
struct Levels {
  static constexpr int HALVES = BITS == 4 ? 2 : 1;
  using Memory = unsigned[2][HALVES];

  unsigned half[HALVES];

  static __device__ Bytes bytes(int, int) { return {1 / LEVELS<BITS>::unit, 0.5f}; }

  static __device__ void write(Memory& to, int zero, int = 0) {
    for (int i = 0; i < HALVES; i++) to[0][i] = to[1][i] = LEVELS<BITS>::words[2 * i] ^ zero;
  }
  __device__ void read(const Memory& from) {
#pragma unroll
    for (int i = 0; i < HALVES; i++) half[i] = from[threadIdx.x % 2][i];
  }
};

// Two segments need no table, since levels are uniform: what a mask leaves of packed bytes are
// levels but for an offset and, in the second segment, whose codes are the lower bits, a factor.
template <int BITS>
struct Levels<BITS, 2> {
  using Memory = unsigned;

  // The bits of the first segment in each byte of a word.
  Memory upper;

  static __device__ Bytes bytes(int segment, int first_bits) {
    constexpr float UNIT = 1 / SEGMENTED::unit;
    float share = (0x100 >> first_bits) * (1.0f / 256);
    if (segment == 0) return {UNIT, 128 - OFFSET + 128 * share};
    return {UNIT * (1 << first_bits), 0.5f - OFFSET * share};
  }

  static __device__ void write(Memory& to, int zero, int first_bits) {
    to = 0x01010101u * (0x100 - (0x100 >> first_bits)) ^ zero;
  }
  __device__ void read(const Memory& from) { upper = from; }

  __device__ unsigned first(unsigned packed) const { return (packed & upper) ^ 0x80808080u; }
  __device__ unsigned second(unsigned packed) const { return packed & ~upper; }
};

// The levels of the four codes in the lower and of those in the upper half of `word`.
template <int BITS>
__device__ inline void look_up(
    const Levels<BITS>& levels, unsigned word, unsigned (&lower)[BITS == 4 ? 2 : 1], unsigned (&upper)[BITS == 4 ? 2 : 1]) {
  constexpr unsigned const* level = LEVELS<BITS>::words;
  lower[0] = pick(levels.half[0], level[1], word);
  upper[0] = pick(levels.half[0], level[1], word >> 16);
  if constexpr (BITS == 4) {
    // prmt spreads the sign of the chosen byte where the fourth bit of the selector is
    // set. The first table holds negative levels, which spread to -1, the second one
    // holds positive levels plus 1, which spread to 0.
    unsigned flipped = word ^ 0x88888888u;
    lower[1] = pick(levels.half[1], level[3], flipped);
    upper[1] = pick(levels.half[1], level[3], flipped >> 16);
  }
}

// What a scale stands for, and its power of two.
__device__ inline float octave_of(unsigned scale) { return float(scale) * (1.0f / STEPS_PER_OCTAVE) + LOWEST_OCTAVE; }
__device__ inline float size_of(unsigned scale) { return exp2_fast(octave_of(scale)); }

// Byte i of words.
template <int N>
__device__ inline unsigned byte_of(const unsigned (&words)[N], int i) {
  return words[i / 4] >> (i % 4 * 8) & 0xFF;
}

// Four whole numbers from 0 to WHOLE, in the low bits of `x`, as upper and lower bytes:
// x = 256 upper + lower, both signed.
constexpr float WHOLE = 127 * 256;
// Added to a float, leaves its nearest whole number in the low bits.
constexpr float TO_WHOLE = 12582912.0f;

__device__ inline void split_bytes(const unsigned (&x)[4], unsigned& upper, unsigned& lower) {
  unsigned first = pick(x[0], x[1], 0x5410), second = pick(x[2], x[3], 0x5410);
  lower = pick(first, second, 0x6420);
  upper = pick(first + 0x00800080u, second + 0x00800080u, 0x7531);
}

// N words of bytes that follow each other, of which those from `count` on repeat the last.
template <int N>
__device__ inline void load_bytes(const unsigned char* from, int count, unsigned (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    to[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      to[i] |= unsigned(from[min(4 * i + j, count - 1)]) << (8 * j);
    }
  }
}
