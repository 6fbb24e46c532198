// What a CUDA kernel sees on the CPU, in place of ptx.cu and of what NVRTC brings.
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

// The element k (0 to 3) of a register of four signed bytes.
inline int signed_byte(unsigned word, int k) { return int8_t(word >> (8 * k)); }

// PTX ISA, "Matrix Fragments for mma.m16n8k32": lane 4 g + c holds rows g and g + 8 of a,
// column g of b and columns 2 c and 2 c + 1 of the sum.
inline void multiply_add(
    int (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, const unsigned (&b)[2]) {
  int g = emulator::lane() / 4, c = emulator::lane() % 4;
  auto all = emulator::meet_warp({a0, a1, a2, a3, b[0], b[1]});
  for (int i = 0; i < 4; i++) {
    int column = 2 * c + i % 2;
    for (int k = 0; k < 32; k++) {
      int a = signed_byte(all[4 * g + k % 16 / 4][i / 2 + k / 16 * 2], k % 4);
      int other = signed_byte(all[4 * column + k % 16 / 4][4 + k / 16], k % 4);
      sum[i] += a * other;
    }
  }
}

inline unsigned pack_halves(float lower, float upper) {
  return emulator::bits<uint16_t>(_Float16(lower)) | unsigned(emulator::bits<uint16_t>(_Float16(upper))) << 16;
}
inline float lower_half(unsigned word) { return emulator::bits<_Float16>(uint16_t(word)); }
inline float upper_half(unsigned word) { return lower_half(word >> 16); }

// The same for m16n8k16 and two halves in a register.
inline void multiply_add(
    float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, const unsigned (&b)[2]) {
  int g = emulator::lane() / 4, c = emulator::lane() % 4;
  auto all = emulator::meet_warp({a0, a1, a2, a3, b[0], b[1]});
  for (int i = 0; i < 4; i++) {
    int column = 2 * c + i % 2;
    for (int k = 0; k < 16; k++) {
      unsigned a = all[4 * g + k % 8 / 2][i / 2 + k / 8 * 2];
      unsigned other = all[4 * column + k % 8 / 2][4 + k / 8];
      sum[i] += lower_half(a >> (k % 2 * 16)) * lower_half(other >> (k % 2 * 16));
    }
  }
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
