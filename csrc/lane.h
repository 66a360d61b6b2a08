// What the formulas need of the type they run on. A "lane type" F is float or double (on the device, in tests), or
// a SIMD vector of floats (cpu/lanes.h). Each formula in this folder is written once, as a template over F.
#pragma once

#include <cstdint>
#include <cstring>
#include <math.h>

#ifdef __CUDACC__
#define BNN_FN __host__ __device__ __forceinline__
#else
#define BNN_FN inline __attribute__((always_inline))
#endif

#ifdef __CUDACC__
#define BNN_UNROLL _Pragma("unroll")
#else
#define BNN_UNROLL _Pragma("GCC unroll 16")
#endif

// Every instruction set compiles these templates in a namespace of its own: the linker would otherwise merge
// instantiations of the same name, and generic code would run AVX instructions.
#ifndef BNN_FAST_ISA
#define BNN_FAST_ISA scalar
#endif
#define BNN_FAST_BEGIN namespace bnn_fast { inline namespace BNN_FAST_ISA {
#define BNN_FAST_END }}

BNN_FAST_BEGIN

// Scalar: the element. Int, UInt: 32-bit integers, one per lane (Philox words). Word: what Philox computes on.
template <class F> struct Lane;

template <> struct Lane<float> {
  using Scalar = float;
  using Int = int32_t;
  using UInt = uint32_t;
  using Word = uint32_t;
  static constexpr int width = 1;
};

template <> struct Lane<double> {
  using Scalar = double;
  using Int = int32_t;
  using UInt = uint32_t;
  using Word = uint32_t;
  static constexpr int width = 1;
};

template <class To, class From> BNN_FN To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}

// x in every lane. (0 + x would stay an addition, since it is not x where x is -0.)
template <class F> BNN_FN F splat(typename Lane<F>::Scalar x) { return x - F{}; }

BNN_FN float fma_lane(float a, float b, float c) { return fmaf(a, b, c); }
BNN_FN double fma_lane(double a, double b, double c) { return fma(a, b, c); }

// Correctly rounded, for x from 2^-100 on. On the device it is sqrtf without its branch for smaller x.
BNN_FN float sqrt_lane(float x) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  float root = x * inverse;
  return fmaf(fmaf(-root, root, x), 0.5f * inverse, root);
#else
  return sqrtf(x);
#endif
}
BNN_FN double sqrt_lane(double x) { return sqrt(x); }

// a / b where the last bits may differ between machines, for normal b.
BNN_FN float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
#else
  return a / b;
#endif
}
BNN_FN double quotient(double a, double b) { return a / b; }

BNN_FN float abs_lane(float x) { return fabsf(x); }
BNN_FN double abs_lane(double x) { return fabs(x); }

BNN_FN float select(bool mask, float a, float b) { return mask ? a : b; }
BNN_FN double select(bool mask, double a, double b) { return mask ? a : b; }

// Rounds to nearest, as every conversion here does.
template <class F> BNN_FN F to_floating(typename Lane<F>::Int i) { return static_cast<F>(i); }

// High and low half of the 64-bit product a * m.
BNN_FN void multiply_high_low(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
#ifdef __CUDA_ARCH__
  uint64_t product;  // nvcc makes a 64 x 64 bit product of the expression below
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(m));
#else
  uint64_t product = static_cast<uint64_t>(a) * m;
#endif
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

BNN_FN uint32_t to_word(uint32_t x) { return x; }
BNN_FN uint32_t from_word(uint32_t x) { return x; }

// Lane l of a vector of counters stands for this counter; chosen so that transpose4 stays inside 128-bit blocks.
template <class F> BNN_FN typename Lane<F>::UInt counter_iota() { return 0; }

// e[k] holds column k of every lane's four; afterwards e[0], e[1], ... hold consecutive columns.
template <class F> BNN_FN void transpose4(F (&)[4]) {}

BNN_FAST_END
