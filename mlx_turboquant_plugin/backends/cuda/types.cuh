// Half-precision numbers, without headers of CUDA, which take NVRTC longer than a kernel.

struct Half {
  unsigned short bits;
  Half() = default;
  __device__ explicit Half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};

struct Bfloat {
  unsigned short bits;
  Bfloat() = default;
  __device__ explicit Bfloat(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
