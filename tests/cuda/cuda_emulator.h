// What a CUDA kernel sees on the CPU, in place of ptx.cu and of what NVRTC brings.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using Shape = std::array<int, 10>;
using Strides = std::array<int64_t, 10>;
struct Index { int x, y, z; };

namespace emulator {

constexpr int LANES = 32;

// Of the thread that runs.
extern Index thread_index, block_index, grid_size;

using Words = std::array<uint32_t, 8>;

// Deposits `words`, waits for the others of the warp or the block, and returns what all of
// the warp deposited.
const Words* meet_warp(const Words& words);
void meet_block();

inline int lane() { return thread_index.x % LANES; }

template <typename To, typename From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define gridDim emulator::grid_size

struct Bfloat16 {
  uint16_t word;
  // To nearest, ties to even.
  explicit Bfloat16(float x) {
    uint32_t bits = emulator::bits<uint32_t>(x);
    word = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  }
  operator float() const { return emulator::bits<float>(uint32_t(word) << 16); }
};

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float max(float a, float b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __log2f(float x) { return std::log2(x); }
inline float __int_as_float(unsigned x) { return emulator::bits<float>(x); }

inline unsigned __funnelshift_l(unsigned low, unsigned high, int shift) {
  return shift ? high << shift | low >> (32 - shift) : high;
}

inline void __syncthreads() { emulator::meet_block(); }
inline void __syncwarp() { emulator::meet_warp({}); }

template <typename T>
T __shfl_sync(unsigned, T x, int from) {
  uint32_t word = emulator::bits<uint32_t>(x);
  auto all = emulator::meet_warp({word});
  return emulator::bits<T>(all[from][0]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int other) {
  return __shfl_sync(mask, x, emulator::lane() ^ other);
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  for (int bit = 1; bit < emulator::LANES; bit *= 2) x = std::max(x, __shfl_xor_sync(mask, x, bit));
  return x;
}
inline int __reduce_add_sync(unsigned mask, int x) {
  for (int bit = 1; bit < emulator::LANES; bit *= 2) x += __shfl_xor_sync(mask, x, bit);
  return x;
}

// ptx.cu

inline unsigned pick(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = a | uint64_t(b) << 32;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) {
    unsigned choice = selector >> (4 * i) & 15, byte = bytes >> (8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline void prefetch_line(const void*) {}

// PTX ISA, "Matrix Fragments for mma.m16n8k32" and "mma.m16n8k16": lane 4 g + c holds rows g and
// g + 8 of a, column g of b and columns 2 c and 2 c + 1 of the sum. element(word, k): of those
// that a register holds.
template <int K, typename T, typename Element>
void multiply_fragments(T (&sum)[4], const emulator::Words& own, Element element) {
  constexpr int HALF = K / 2, EACH = K / 8;
  int g = emulator::lane() / 4, c = emulator::lane() % 4;
  auto all = emulator::meet_warp(own);
  for (int i = 0; i < 4; i++) {
    int column = 2 * c + i % 2;
    for (int k = 0; k < K; k++) {
      T a = element(all[4 * g + k % HALF / EACH][i / 2 + k / HALF * 2], k % EACH);
      sum[i] += a * element(all[4 * column + k % HALF / EACH][4 + k / HALF], k % EACH);
    }
  }
}

inline void multiply_add(
    int (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, const unsigned (&b)[2]) {
  auto byte = [](unsigned word, int k) { return int(int8_t(word >> (8 * k))); };
  multiply_fragments<32>(sum, {a0, a1, a2, a3, b[0], b[1]}, byte);
}

inline unsigned pack_halves(float lower, float upper) {
  auto word = [](float x) { return unsigned(emulator::bits<uint16_t>(_Float16(x))); };
  return word(lower) | word(upper) << 16;
}
inline float lower_half(unsigned word) { return emulator::bits<_Float16>(uint16_t(word)); }
inline float upper_half(unsigned word) { return lower_half(word >> 16); }

inline void multiply_add(
    float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, const unsigned (&b)[2]) {
  auto half = [](unsigned word, int k) { return lower_half(word >> (16 * k)); };
  multiply_fragments<16>(sum, {a0, a1, a2, a3, b[0], b[1]}, half);
}

inline void copy_words(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) std::abort();
  std::memcpy(to, from, 16);
}

inline void wait_for_copies() {}

template <typename T>
T __ldg(const T* from) { return *from; }

template <int N>
inline void load_words(const unsigned char* from, unsigned (&to)[N]) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(to)) std::abort();  // misaligned
  std::memcpy(to, from, sizeof(to));
}
