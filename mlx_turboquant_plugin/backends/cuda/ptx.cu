// What C++ has no words for. Tests on machines without a GPU put others in their place.

// The bytes that the four lower half-bytes of `selector` choose from `a` and `b`: their
// lower three bits say which, the fourth asks for eight times its sign bit.
__device__ inline unsigned pick(unsigned a, unsigned b, unsigned selector) {
  unsigned out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}

__device__ inline float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// sum += a b for a, 16 x 32, and b, 32 x 8, of signed bytes.
__device__ inline void multiply_add(
    int (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
}

// Two numbers rounded to halves of a word, and back.
__device__ inline unsigned pack_halves(float lower, float upper) {
  unsigned out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(upper), "f"(lower));
  return out;
}

__device__ inline float lower_half(unsigned word) {
  float out;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }"
      : "=f"(out) : "r"(word));
  return out;
}

__device__ inline float upper_half(unsigned word) { return lower_half(word >> 16); }

// sum += a b for a, 16 x 16, and b, 16 x 8, of halves.
__device__ inline void multiply_add(
    float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
}

// An aligned load of N words.
template <int N>
__device__ inline void load_words(const unsigned char* from, unsigned (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = __ldg(reinterpret_cast<const unsigned*>(from));
  } else if constexpr (N == 2) {
    uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
    to[0] = x.x, to[1] = x.y;
  } else {
    static_assert(N == 4);
    uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  }
}

// Four aligned words to shared memory, which are there after wait_for_copies().
__device__ inline void copy_words(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::
      "r"(unsigned(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Asks for the line of memory around `at` and does not wait. What a model does between two
// launches for one layer leaves nothing of it in the cache, and loads that need each other
// would wait for memory one after the other.
__device__ inline void prefetch_line(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}
