// Lane types of 8 and 16 floats, on GCC/Clang vector types. Arithmetic, comparisons and conversions are the compiler's own;
// what it cannot express well (fma, sqrt, the 32 x 32 -> 64 bit product, the 4 x 4 transpose, sums in double) is here.
//
// The 16-lane type uses AVX-512 where it is compiled for it and pairs of AVX2 registers elsewhere, so that the 16-lane
// code can be tested on a machine without AVX-512.
#pragma once

#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined: no vector crosses a call
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"        // GCC 12's AVX-512 headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // (GCC bug 105593)
#endif

#include "../lane.h"

// 512: AVX-512, 256: AVX2 and FMA, 0: neither. The compiler's macros do not follow a target pragma everywhere.
#ifndef BNN_FAST_VECTOR_BITS
#if defined(__AVX512F__)
#define BNN_FAST_VECTOR_BITS 512
#elif defined(__AVX2__) && defined(__FMA__)
#define BNN_FAST_VECTOR_BITS 256
#else
#define BNN_FAST_VECTOR_BITS 0
#endif
#endif

#if BNN_FAST_VECTOR_BITS >= 256
#include <immintrin.h>

BNN_FAST_BEGIN

using f32x8 = float __attribute__((vector_size(32)));
using i32x8 = int32_t __attribute__((vector_size(32)));
using u32x8 = uint32_t __attribute__((vector_size(32)));
using u64x4 = uint64_t __attribute__((vector_size(32)));
using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u64x8 = uint64_t __attribute__((vector_size(64)));

// Philox words of a vector of counters: even and odd lanes apart, each in the low half of a 64-bit lane, where the multiplier
// reads them and leaves the product. High halves hold leftovers that the next product ignores.
template <class V> struct EvenOdd {
  V even, odd;
};

template <> struct Lane<f32x8> {
  using Scalar = float;
  using Int = i32x8;
  using UInt = u32x8;
  using Word = EvenOdd<u64x4>;
  static constexpr int width = 8;
};

template <> struct Lane<f32x16> {
  using Scalar = float;
  using Int = i32x16;
  using UInt = u32x16;
  using Word = EvenOdd<u64x8>;
  static constexpr int width = 16;
};

template <class Half, class Whole> struct Halves {
  Half low, high;
};

BNN_FN f32x8 fma_lane(f32x8 a, f32x8 b, f32x8 c) { return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
BNN_FN f32x8 sqrt_lane(f32x8 x) { return (f32x8)_mm256_sqrt_ps((__m256)x); }
BNN_FN u64x4 multiply_low32(u64x4 a, u64x4 b) { return (u64x4)_mm256_mul_epu32((__m256i)a, (__m256i)b); }

#if BNN_FAST_VECTOR_BITS >= 512
BNN_FN f32x16 fma_lane(f32x16 a, f32x16 b, f32x16 c) { return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
BNN_FN f32x16 sqrt_lane(f32x16 x) { return (f32x16)_mm512_sqrt_ps((__m512)x); }
BNN_FN u64x8 multiply_low32(u64x8 a, u64x8 b) { return (u64x8)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#else
using f32x8x2 = Halves<f32x8, f32x16>;
BNN_FN f32x16 fma_lane(f32x16 a, f32x16 b, f32x16 c) {
  f32x8x2 x = bit_cast<f32x8x2>(a), y = bit_cast<f32x8x2>(b), z = bit_cast<f32x8x2>(c);
  return bit_cast<f32x16>(f32x8x2{fma_lane(x.low, y.low, z.low), fma_lane(x.high, y.high, z.high)});
}
BNN_FN f32x16 sqrt_lane(f32x16 x) {
  f32x8x2 h = bit_cast<f32x8x2>(x);
  return bit_cast<f32x16>(f32x8x2{sqrt_lane(h.low), sqrt_lane(h.high)});
}
BNN_FN u64x8 multiply_low32(u64x8 a, u64x8 b) {
  using u64x4x2 = Halves<u64x4, u64x8>;
  u64x4x2 x = bit_cast<u64x4x2>(a), y = bit_cast<u64x4x2>(b);
  return bit_cast<u64x8>(u64x4x2{multiply_low32(x.low, y.low), multiply_low32(x.high, y.high)});
}
#endif

template <class V> BNN_FN EvenOdd<V> operator^(EvenOdd<V> a, EvenOdd<V> b) { return {a.even ^ b.even, a.odd ^ b.odd}; }
template <class V> BNN_FN EvenOdd<V> operator^(EvenOdd<V> a, uint64_t b) {
  V key = V{} + b;
  return {a.even ^ key, a.odd ^ key};
}

template <class V>
BNN_FN void multiply_high_low(EvenOdd<V> a, uint32_t m, EvenOdd<V>& high, EvenOdd<V>& low) {
  V multiplier = V{} + uint64_t(m);
  low = {multiply_low32(a.even, multiplier), multiply_low32(a.odd, multiplier)};
  high = {low.even >> 32, low.odd >> 32};
}

BNN_FN EvenOdd<u64x4> to_word(u32x8 x) { return {bit_cast<u64x4>(x), bit_cast<u64x4>(x) >> 32}; }
BNN_FN EvenOdd<u64x8> to_word(u32x16 x) { return {bit_cast<u64x8>(x), bit_cast<u64x8>(x) >> 32}; }
BNN_FN u32x8 from_word(EvenOdd<u64x4> x) {
  return bit_cast<u32x8>((x.even & uint64_t(0xffffffff)) | (x.odd << 32));
}
BNN_FN u32x16 from_word(EvenOdd<u64x8> x) {
  return bit_cast<u32x16>((x.even & uint64_t(0xffffffff)) | (x.odd << 32));
}

BNN_FN f32x8 quotient(f32x8 a, f32x8 b) { return a / b; }
BNN_FN f32x16 quotient(f32x16 a, f32x16 b) { return a / b; }
BNN_FN f32x8 select(i32x8 mask, f32x8 a, f32x8 b) { return mask ? a : b; }
BNN_FN f32x16 select(i32x16 mask, f32x16 a, f32x16 b) { return mask ? a : b; }
BNN_FN f32x8 abs_lane(f32x8 x) { return bit_cast<f32x8>(bit_cast<i32x8>(x) & 0x7fffffff); }
BNN_FN f32x16 abs_lane(f32x16 x) { return bit_cast<f32x16>(bit_cast<i32x16>(x) & 0x7fffffff); }
BNN_FN f32x8 flip_sign(f32x8 x, u32x8 sign) { return bit_cast<f32x8>(bit_cast<u32x8>(x) ^ sign); }
BNN_FN f32x16 flip_sign(f32x16 x, u32x16 sign) { return bit_cast<f32x16>(bit_cast<u32x16>(x) ^ sign); }

template <> BNN_FN f32x8 to_floating<f32x8>(i32x8 i) { return __builtin_convertvector(i, f32x8); }
template <> BNN_FN f32x16 to_floating<f32x16>(i32x16 i) { return __builtin_convertvector(i, f32x16); }

// Lane 4b + j is counter (width/4) j + b: after a 4 x 4 transpose inside each 128-bit block b, vector j is consecutive.
template <> BNN_FN u32x8 counter_iota<f32x8>() { return u32x8{0, 2, 4, 6, 1, 3, 5, 7}; }
template <> BNN_FN u32x16 counter_iota<f32x16>() {
  return u32x16{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
}

template <> BNN_FN void transpose4<f32x8>(f32x8 (&e)[4]) {
  __m256 a = _mm256_unpacklo_ps((__m256)e[0], (__m256)e[1]), b = _mm256_unpackhi_ps((__m256)e[0], (__m256)e[1]);
  __m256 c = _mm256_unpacklo_ps((__m256)e[2], (__m256)e[3]), d = _mm256_unpackhi_ps((__m256)e[2], (__m256)e[3]);
  e[0] = (f32x8)_mm256_unpacklo_pd((__m256d)a, (__m256d)c);
  e[1] = (f32x8)_mm256_unpackhi_pd((__m256d)a, (__m256d)c);
  e[2] = (f32x8)_mm256_unpacklo_pd((__m256d)b, (__m256d)d);
  e[3] = (f32x8)_mm256_unpackhi_pd((__m256d)b, (__m256d)d);
}

template <> BNN_FN void transpose4<f32x16>(f32x16 (&e)[4]) {
#if BNN_FAST_VECTOR_BITS >= 512
  __m512 a = _mm512_unpacklo_ps((__m512)e[0], (__m512)e[1]), b = _mm512_unpackhi_ps((__m512)e[0], (__m512)e[1]);
  __m512 c = _mm512_unpacklo_ps((__m512)e[2], (__m512)e[3]), d = _mm512_unpackhi_ps((__m512)e[2], (__m512)e[3]);
  e[0] = (f32x16)_mm512_unpacklo_pd((__m512d)a, (__m512d)c);
  e[1] = (f32x16)_mm512_unpackhi_pd((__m512d)a, (__m512d)c);
  e[2] = (f32x16)_mm512_unpacklo_pd((__m512d)b, (__m512d)d);
  e[3] = (f32x16)_mm512_unpackhi_pd((__m512d)b, (__m512d)d);
#else
  f32x8 low[4], high[4];
  for (int k = 0; k < 4; ++k) {
    f32x8x2 h = bit_cast<f32x8x2>(e[k]);
    low[k] = h.low;
    high[k] = h.high;
  }
  transpose4<f32x8>(low);
  transpose4<f32x8>(high);
  for (int k = 0; k < 4; ++k) e[k] = bit_cast<f32x16>(f32x8x2{low[k], high[k]});
#endif
}

BNN_FAST_END
#endif  // BNN_FAST_VECTOR_BITS >= 256

BNN_FAST_BEGIN

template <class F> BNN_FN F load(const typename Lane<F>::Scalar* p) {
  if constexpr (requires(F f) { f.low; }) {  // pair.h
    using V = decltype(F::low);
    return {load<V>(p), load<V>(p + Lane<V>::width)};
  } else {
    F x;
    memcpy(&x, p, sizeof x);
    return x;
  }
}
template <class F> BNN_FN void store(typename Lane<F>::Scalar* p, F x) {
  if constexpr (requires { x.low; }) {
    using V = decltype(F::low);
    store<V>(p, x.low);
    store<V>(p + Lane<V>::width, x.high);
  } else {
    memcpy(p, &x, sizeof x);
  }
}

// x, loaded once: GCC would load it again for each of its uses.
template <class F> BNN_FN F in_register(F x) { return x; }
#if BNN_FAST_VECTOR_BITS >= 512
template <> BNN_FN f32x16 in_register(f32x16 x) {
  __asm__("" : "+v"(x));
  return x;
}
#endif

// The sum of a vector's lanes, as a tree.
BNN_FN float sum_lanes(float x) { return x; }
BNN_FN double sum_lanes(double x) { return x; }
#if BNN_FAST_VECTOR_BITS >= 256
BNN_FN float sum_lanes(f32x8 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
BNN_FN float sum_lanes(f32x16 x) {
  Halves<f32x8, f32x16> h = bit_cast<Halves<f32x8, f32x16>>(x);
  return sum_lanes(h.low + h.high);
}
#endif

#if BNN_FAST_VECTOR_BITS >= 256
// to[r] = the sum of lanes r, r + 4, ...
BNN_FN void sum_blocks(f32x8 x, float* to) {
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1)));
}
BNN_FN void sum_blocks(f32x16 x, float* to) {
  Halves<f32x8, f32x16> h = bit_cast<Halves<f32x8, f32x16>>(x);
  sum_blocks(h.low + h.high, to);
}
#endif

// sums[r] = the sum of e[r]'s lanes, of R vectors.
template <class F, int R> BNN_FN void sum_lanes_of(const F* e, typename Lane<F>::Scalar* sums) {
  int r = 0;
  if constexpr (Lane<F>::width > 1)
    for (; r + 4 <= R; r += 4) {
      F four[4] = {e[r], e[r + 1], e[r + 2], e[r + 3]};
      transpose4<F>(four);  // inside each block of four lanes
      sum_blocks((four[0] + four[1]) + (four[2] + four[3]), sums + r);
    }
  for (; r < R; ++r) sums[r] = sum_lanes(e[r]);
}

// A sum in a fixed order: scalars in double, vectors compensated lane by lane (Kahan, "Further remarks on reducing
// truncation errors", 1965), which is cheaper than widening them.
template <class F> struct Sum {
  F sum = {}, lost = {};
  BNN_FN void add(F x) {
    F corrected = x - lost, next = sum + corrected;
    F error = (next - sum) - corrected;
    lost = select(error == error, error, F{});  // an infinite sum stays infinite
    sum = next;
  }
  BNN_FN double total() const {
    double all = 0;
    for (int i = 0; i < Lane<F>::width; ++i) all += static_cast<double>(sum[i]) - static_cast<double>(lost[i]);
    return all;
  }
};
template <class F> requires(Lane<F>::width == 1) struct Sum<F> {
  double sum = 0;
  BNN_FN void add(F x) { sum += x; }
  BNN_FN double total() const { return sum; }
};

BNN_FAST_END
