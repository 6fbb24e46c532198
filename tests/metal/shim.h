// The part of the Metal Shading Language that the kernels use, as C++14 for clang.
#pragma once
#include "interface.h"

// ---------------------------------------------------------------------- the language

#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 310

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t, uchar;
typedef unsigned short uint16_t, ushort;
typedef uint uint32_t;
typedef unsigned long uint64_t, ulong, size_t;
typedef long ptrdiff_t;
typedef _Float16 half, float16_t;
typedef __bf16 bfloat, bfloat16_t;
constexpr half operator""h(long double value) { return half(float(value)); }
constexpr bfloat operator""bf(long double value) { return bfloat(float(value)); }
#pragma GCC poison double  // Metal has none; literals are made float by the compiler's options

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.19209290e-07f
#define HALF_MAX half(65504.0f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_SQRT2_F 1.41421356237309504880f

#define EMU_VECTORS(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2)));     \
  typedef T T##3 __attribute__((ext_vector_type(3)));     \
  typedef T T##4 __attribute__((ext_vector_type(4)));
EMU_VECTORS(char)
EMU_VECTORS(uchar)
EMU_VECTORS(short)
EMU_VECTORS(ushort)
EMU_VECTORS(int)
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
EMU_VECTORS(long)
EMU_VECTORS(ulong)
EMU_VECTORS(half)
EMU_VECTORS(bfloat)
EMU_VECTORS(float)
EMU_VECTORS(bool)

// A declaration of threadgroup memory is rewritten: its variables become members of `owner`,
// and then references to memory of the runtime.
#define EMU_THREADGROUP(owner, name, number)                                      \
  threadgroup decltype(owner::name)& name =                                       \
      *(threadgroup decltype(owner::name)*)emu_threadgroup_variable(              \
          number, #name, sizeof(owner::name), alignof(decltype(owner::name)))

#define EMU_SITE int emu_line = __builtin_LINE(), int emu_column = __builtin_COLUMN()
#define EMU_AT emu_line, emu_column

namespace metal {

// ---------------------------------------------------------------------- types

template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));

template <class T> struct emu_shape {
  using element = T;
  static constexpr int size = 1;
};
template <class T, int N> struct emu_shape<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int size = N;
};
template <class V> using emu_element = typename emu_shape<V>::element;

template <class A, class B> constexpr bool is_same_v = false;
template <class A> constexpr bool is_same_v<A, A> = true;
template <bool condition, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool condition, class A, class B>
using conditional_t = typename conditional<condition, A, B>::type;
template <bool condition, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool condition, class T = void>
using enable_if_t = typename enable_if<condition, T>::type;

template <class To, class From> METAL_FUNC To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return __builtin_bit_cast(To, value);
}

// float4(a, b, ...): clang knows no such constructors, so that it becomes emu_make<float4>(...).
template <class V, class A> METAL_FUNC void emu_append(V& to, int& count, A part) {
  if constexpr (emu_shape<A>::size == 1) to[count++] = (emu_element<V>)part;
  else for (int i = 0; i < emu_shape<A>::size; i++) to[count++] = (emu_element<V>)part[i];
}
template <class V, class... A> METAL_FUNC V emu_make(A... parts) {
  constexpr int given = (0 + ... + emu_shape<A>::size);
  constexpr bool splat = given == 1;
  static_assert(splat || given == emu_shape<V>::size, "vector: wrong number of elements");
  V result = {};
  int count = 0;
  for (int i = 0; i < (splat ? emu_shape<V>::size : 1); i++)
    (emu_append(result, count, parts), ...);
  return result;
}

template <class T> struct numeric_limits;
#define EMU_LIMITS(T, MAX)                                    \
  template <> struct numeric_limits<T> {                      \
    static constexpr T max() { return (T)MAX; }               \
    static constexpr T lowest() { return (T)-MAX; }           \
    static constexpr T infinity() { return (T)INFINITY; }     \
  };
EMU_LIMITS(float, FLT_MAX)
EMU_LIMITS(half, 65504.0f)
EMU_LIMITS(bfloat, 3.38953139e+38f)

// ---------------------------------------------------------------------- mathematics
// Arguments of different types are errors, as in Metal, where they are ambiguous.

// F::of() of a scalar, or of each element of vectors.
template <class F, class T, class... Same> METAL_FUNC T emu_map(T a, Same... more) {
  if constexpr (emu_shape<T>::size == 1) return (T)F::of(a, more...);
  else {
    T result;
    for (int i = 0; i < emu_shape<T>::size; i++)
      result[i] = (emu_element<T>)F::of((emu_element<T>)a[i], (emu_element<T>)more[i]...);
    return result;
  }
}
#define EMU_EACH(NAME, ARGUMENTS, PASSED, EXPRESSION)                          \
  struct emu_each_##NAME {                                                     \
    template <class T> METAL_FUNC static T of ARGUMENTS {                      \
      constexpr int width = 8 * sizeof(T);                                     \
      (void)width;                                                             \
      return (T)(EXPRESSION);                                                  \
    }                                                                          \
  };                                                                           \
  template <class T> METAL_FUNC T NAME ARGUMENTS { return emu_map<emu_each_##NAME> PASSED; }

template <class T> METAL_FUNC float emu_float(T a) {
  static_assert(is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>,
                "this function takes floats only");
  return (float)a;
}
METAL_FUNC float emu_rsqrt(float a) { return 1.0f / __builtin_sqrtf(a); }
#define EMU_MATH_1(NAME, F) EMU_EACH(NAME, (T a), (a), F(emu_float(a)))
#define EMU_MATH_2(NAME, F) EMU_EACH(NAME, (T a, T b), (a, b), F(emu_float(a), emu_float(b)))
EMU_MATH_1(exp, __builtin_expf)
EMU_MATH_1(exp2, __builtin_exp2f)
EMU_MATH_1(log, __builtin_logf)
EMU_MATH_1(log2, __builtin_log2f)
EMU_MATH_1(sin, __builtin_sinf)
EMU_MATH_1(cos, __builtin_cosf)
EMU_MATH_1(tanh, __builtin_tanhf)
EMU_MATH_1(sqrt, __builtin_sqrtf)
EMU_MATH_1(rsqrt, emu_rsqrt)
EMU_MATH_1(fabs, __builtin_fabsf)
EMU_MATH_1(floor, __builtin_floorf)
EMU_MATH_1(ceil, __builtin_ceilf)
EMU_MATH_1(trunc, __builtin_truncf)
EMU_MATH_1(round, __builtin_roundf)
EMU_MATH_1(rint, __builtin_rintf)
EMU_MATH_2(pow, __builtin_powf)
EMU_MATH_2(fmod, __builtin_fmodf)
EMU_MATH_2(fmin, __builtin_fminf)
EMU_MATH_2(fmax, __builtin_fmaxf)
EMU_EACH(fma, (T a, T b, T c), (a, b, c),
         __builtin_fmaf(emu_float(a), emu_float(b), emu_float(c)))
namespace precise = ::metal;
namespace fast = ::metal;

template <class T> METAL_FUNC T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T, int N> METAL_FUNC vec<T, N> mix(vec<T, N> a, vec<T, N> b, T t) {
  return a + (b - a) * t;
}
template <class T, int N> METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum += a[i] * b[i];
  return sum;
}
template <class T> METAL_FUNC bool isnan(T a) { return a != a; }
template <class T> METAL_FUNC bool isinf(T a) { return __builtin_isinf((float)a); }
template <class T> METAL_FUNC bool isfinite(T a) { return __builtin_isfinite((float)a); }

EMU_EACH(min, (T a, T b), (a, b), b < a || a != a ? b : a)
EMU_EACH(max, (T a, T b), (a, b), b > a || a != a ? b : a)
EMU_EACH(abs, (T a), (a), a < (T)0 ? -a : a)
EMU_EACH(sign, (T a), (a), a > (T)0 ? (T)1 : a < (T)0 ? (T)-1 : a == a ? a : (T)0)
EMU_EACH(popcount, (T a), (a), __builtin_popcountl((__make_unsigned(T))a))
EMU_EACH(clz, (T a), (a), a ? __builtin_clzl((__make_unsigned(T))a) - (64 - width) : width)
EMU_EACH(ctz, (T a), (a), a ? __builtin_ctzl((__make_unsigned(T))a) : width)
template <class T> METAL_FUNC T clamp(T a, T low, T high) { return min(max(a, low), high); }
template <class T, int N> METAL_FUNC vec<T, N> clamp(vec<T, N> a, T low, T high) {
  return clamp(a, (vec<T, N>)low, (vec<T, N>)high);
}
template <class T> METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++) a[i] = c[i] ? b[i] : a[i];
  return a;
}
template <class T> METAL_FUNC T extract_bits(T a, uint offset, uint bits) {
  constexpr uint width = 8 * sizeof(T);
  if (offset + bits > width) emu_undefined("extract_bits outside of the number");
  if (bits == 0) return (T)0;
  return (T)((T)((__make_unsigned(T))a << (width - offset - bits)) >> (width - bits));
}

// ---------------------------------------------------------------------- meetings of threads

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = EMU_FENCE_DEVICE,
  mem_threadgroup = EMU_FENCE_THREADGROUP
};
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(uint(a) | uint(b));
}
METAL_FUNC void threadgroup_barrier(mem_flags fence, EMU_SITE) {
  emu_threadgroup_barrier(uint(fence), EMU_AT);
}
METAL_FUNC void simdgroup_barrier(mem_flags fence, EMU_SITE) {
  emu_simdgroup_barrier(uint(fence), EMU_AT);
}

// What a lane brings to a simdgroup function, and the result that it takes away.
template <class T> struct emu_slot {
  T value;
  uint argument;
};
template <class T> struct emu_lanes {
  void** slots;
  uint active;
  METAL_FUNC bool has(uint lane) const { return lane < 32 && (active >> lane & 1); }
  METAL_FUNC emu_slot<T>& operator[](uint lane) const { return *(emu_slot<T>*)slots[lane]; }
};
template <class T, class Function>
__attribute__((noinline, no_sanitize("thread"))) void emu_meet(void** slots, uint active) {
  Function::apply(emu_lanes<T>{slots, active});
}
template <class Function, class T> METAL_FUNC T emu_together(T value, uint argument, EMU_SITE) {
  static_assert(sizeof(emu_element<T>) <= 4 && !is_same_v<emu_element<T>, bool>,
                "simdgroup functions take no bool and no type of 64 bits");
  emu_slot<T> slot = {value, argument};
  emu_simd_function(&slot, &emu_meet<T, Function>, EMU_AT);
  return slot.value;
}

#define EMU_REDUCTION(NAME, EXPRESSION)                                              \
  struct emu_##NAME {                                                                \
    template <class T> METAL_FUNC static void apply(emu_lanes<T> lanes) {            \
      uint first = __builtin_ctz(lanes.active);                                      \
      T a = lanes[first].value;                                                      \
      for (uint i = first + 1; i < 32; i++)                                          \
        if (lanes.has(i)) {                                                          \
          T b = lanes[i].value;                                                      \
          a = (T)(EXPRESSION);                                                       \
        }                                                                            \
      for (uint i = first; i < 32; i++)                                              \
        if (lanes.has(i)) lanes[i].value = a;                                        \
    }                                                                                \
  };                                                                                 \
  template <class T> METAL_FUNC T NAME(T value, EMU_SITE) {                          \
    return emu_together<emu_##NAME>(value, 0, EMU_AT);                               \
  }
EMU_REDUCTION(simd_sum, a + b)
EMU_REDUCTION(simd_product, a * b)
EMU_REDUCTION(simd_max, max(a, b))
EMU_REDUCTION(simd_min, min(a, b))
EMU_REDUCTION(simd_and, a & b)
EMU_REDUCTION(simd_or, a | b)
EMU_REDUCTION(simd_xor, a ^ b)
METAL_FUNC bool simd_all(bool value, EMU_SITE) { return simd_and((uint)value, EMU_AT); }
METAL_FUNC bool simd_any(bool value, EMU_SITE) { return simd_or((uint)value, EMU_AT); }

// SOURCE is the lane that `lane` takes its result from.
#define EMU_SHUFFLE(NAME, SOURCE)                                                    \
  struct emu_##NAME {                                                                \
    template <class T> METAL_FUNC static void apply(emu_lanes<T> lanes) {            \
      T before[32];                                                                  \
      for (uint i = 0; i < 32; i++)                                                  \
        if (lanes.has(i)) before[i] = lanes[i].value;                                \
      for (uint lane = 0; lane < 32; lane++)                                         \
        if (lanes.has(lane)) {                                                       \
          uint argument = lanes[lane].argument, source = (SOURCE);                   \
          if (!lanes.has(source)) emu_undefined(#NAME " from a lane that is not there"); \
          lanes[lane].value = before[source];                                        \
        }                                                                            \
    }                                                                                \
  };                                                                                 \
  template <class T> METAL_FUNC T NAME(T value, ushort argument, EMU_SITE) {         \
    return emu_together<emu_##NAME>(value, argument, EMU_AT);                        \
  }
EMU_SHUFFLE(simd_shuffle, argument)
EMU_SHUFFLE(simd_shuffle_xor, lane ^ argument)
EMU_SHUFFLE(simd_shuffle_up, lane < argument ? lane : lane - argument)
EMU_SHUFFLE(simd_shuffle_down, lane + argument > 31 ? lane : lane + argument)
EMU_SHUFFLE(simd_shuffle_rotate_up, (lane - argument) & 31)
EMU_SHUFFLE(simd_shuffle_rotate_down, (lane + argument) & 31)
EMU_SHUFFLE(quad_broadcast, (lane & ~3u) + argument)
EMU_SHUFFLE(quad_shuffle_xor, lane ^ (argument & 3))
// All lanes have to name the same one.
EMU_SHUFFLE(simd_broadcast,
            argument == lanes[__builtin_ctz(lanes.active)].argument ? argument : 32)

struct emu_simd_prefix_inclusive_sum {
  template <class T> METAL_FUNC static void apply(emu_lanes<T> lanes) {
    T sum = (T)0;
    for (uint i = 0; i < 32; i++)
      if (lanes.has(i)) lanes[i].value = sum = (T)(sum + lanes[i].value);
  }
};
template <class T> METAL_FUNC T simd_prefix_inclusive_sum(T value, EMU_SITE) {
  return emu_together<emu_simd_prefix_inclusive_sum>(value, 0, EMU_AT);
}
template <class T> METAL_FUNC T simd_prefix_exclusive_sum(T value, EMU_SITE) {
  return simd_prefix_inclusive_sum(value, EMU_AT) - value;
}

}  // namespace metal
using namespace metal;

// From MLX's utils.h, which it puts before every kernel.
template <class Index = int64_t>
METAL_FUNC Index elem_to_loc(Index element, constant int* shape, constant int64_t* strides,
                             int ndim) {
  Index location = 0;
  for (int i = ndim - 1; i >= 0 && element > 0; --i) {
    location += (element % shape[i]) * Index(strides[i]);
    element /= shape[i];
  }
  return location;
}
