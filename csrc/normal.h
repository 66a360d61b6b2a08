// Standard normals from random words (Box and Muller, "A note on the generation of random normal deviates", 1958).
//
// With u(x) = (x + 1/2) 2^-32, r(x) = sqrt(-2 ln u(x)), the words x0..x3 of one Philox counter give
//   r(x0) cos 2 pi u(x1),  r(x0) sin 2 pi u(x1),  r(x2) cos 2 pi u(x3),  r(x2) sin 2 pi u(x3).
//
// The words are reduced as integers, before anything is rounded: r is right in the relative sense where u is near 1, and
// so are sine and cosine near their zeros.
#pragma once

#include "elementary.h"
#include "philox.h"

BNN_FAST_BEGIN

// sqrt(-2 ln u(x)). In the upper half u = 1 - v with v = u(~x) small, and ln u = log1p(-v) keeps all its digits; from 0xb504f2bf
// on, 1 - v is at least sqrt(1/2).
template <class F> BNN_FN F radius(typename Lane<F>::UInt x) {
  using Int = typename Lane<F>::Int;
  Int word = bit_cast<Int>(x);
  F v = fma_lane(to_floating<F>(word ^ (word >> 31)), splat<F>(0x1p-32f), splat<F>(0x1p-33f));
  Int exponent;
  F f = split_exponent(select(word < 0, 1.0f - v, v), exponent);
  f = select(x >= 0xb504f2bfu, -v, f);
  F square = fma_lane(to_floating<F>(exponent), splat<F>(-1.38629436f * 0x1p-23f), -2.0f * log1p_reduced(f));
  return sqrt_lane(square);
}
template <> BNN_FN double radius<double>(uint32_t x) { return sqrt(-2.0 * log((x + 0.5) * 0x1p-32)); }

// sine and cosine of t for |t| <= pi/4.
template <class F> BNN_FN void sincos_reduced(F t, F& sine, F& cosine) {
  F z = t * t;
  F s = splat<F>(-0.000195169341f);
  s = fma_lane(s, z, splat<F>(0.00833217520f));
  s = fma_lane(s, z, splat<F>(-0.166666552f));
  sine = fma_lane(s, z * t, t);
  F c = splat<F>(2.44373332e-5f);
  c = fma_lane(c, z, splat<F>(-0.00138873630f));
  c = fma_lane(c, z, splat<F>(0.0416666456f));
  cosine = fma_lane(c, z * z, fma_lane(z, splat<F>(-0.5f), splat<F>(1.0f)));
}

// Taylor series: at |t| <= pi/4 the first omitted terms are below 2^-60.
BNN_FN void sincos_reduced(double t, double& sine, double& cosine) {
  double z = t * t;
  double s = -1.0 / 1307674368000.0;
  s = fma(s, z, 1.0 / 6227020800.0);
  s = fma(s, z, -1.0 / 39916800.0);
  s = fma(s, z, 1.0 / 362880.0);
  s = fma(s, z, -1.0 / 5040.0);
  s = fma(s, z, 1.0 / 120.0);
  s = fma(s, z, -1.0 / 6.0);
  sine = fma(s, z * t, t);
  double c = 1.0 / 20922789888000.0;
  c = fma(c, z, -1.0 / 87178291200.0);
  c = fma(c, z, 1.0 / 479001600.0);
  c = fma(c, z, -1.0 / 3628800.0);
  c = fma(c, z, 1.0 / 40320.0);
  c = fma(c, z, -1.0 / 720.0);
  c = fma(c, z, 1.0 / 24.0);
  cosine = fma(c, z * z, fma(z, -0.5, 1.0));
}

BNN_FN float flip_sign(float x, uint32_t sign) { return bit_cast<float>(bit_cast<uint32_t>(x) ^ sign); }
BNN_FN double flip_sign(double x, uint32_t sign) {
  return bit_cast<double>(bit_cast<uint64_t>(x) ^ (static_cast<uint64_t>(sign) << 32));
}

// sin 2 pi u(x) and cos 2 pi u(x): the two top bits of x + 2^29 choose the quarter turn, the rest is an angle in [-pi/4, pi/4].
template <class F> BNN_FN void circle(typename Lane<F>::UInt x, F& sine, F& cosine) {
  using Scalar = typename Lane<F>::Scalar;
  using Int = typename Lane<F>::Int;
  using UInt = typename Lane<F>::UInt;
  constexpr Scalar unit = static_cast<Scalar>(1.4629180792671596e-9);  // 2 pi 2^-32
  F s, c;
  sincos_reduced(fma_lane(to_floating<F>(bit_cast<Int>(x << 2)), splat<F>(unit / 4), splat<F>(unit / 2)), s, c);
  UInt turn = x + 0x20000000u;
  auto odd = bit_cast<Int>(turn << 1) < 0;
  sine = flip_sign(select(odd, c, s), turn & 0x80000000u);
  cosine = flip_sign(select(odd, s, c), (x + 0x60000000u) & 0x80000000u);
}

// The four normals of one counter's words.
template <class F, class UInt> BNN_FN void normal4(UInt x0, UInt x1, UInt x2, UInt x3, F (&normal)[4]) {
  F sine, cosine;
  F r = radius<F>(x0);
  circle<F>(x1, sine, cosine);
  normal[0] = r * cosine;
  normal[1] = r * sine;
  r = radius<F>(x2);
  circle<F>(x3, sine, cosine);
  normal[2] = r * cosine;
  normal[3] = r * sine;
}

// Where a tensor's noise comes from: the key, and the part of the counter, that all its elements share.
template <class Keys> struct Noise {
  Keys keys;
  uint32_t stream;
};

// The four normals of each counter of N vectors, in order where columns (divided by 4) and rows are those of counter_iota's
// lanes.
template <class F, int N, class Keys>
BNN_FN void draw_normals(const Noise<Keys>& noise, uint32_t sample, const typename Lane<F>::UInt (&rows)[N],
                         const typename Lane<F>::UInt (&columns)[N], F (&normal)[N][4]) {
  using UInt = typename Lane<F>::UInt;
  typename Lane<F>::Word x[N][4];
  for (int n = 0; n < N; ++n) {
    x[n][0] = to_word(columns[n]);
    x[n][1] = to_word(rows[n]);
    x[n][2] = to_word(UInt{} + sample);
    x[n][3] = to_word(UInt{} + noise.stream);
  }
  philox(x, noise.keys);
  for (int n = 0; n < N; ++n) {
    normal4<F>(from_word(x[n][0]), from_word(x[n][1]), from_word(x[n][2]), from_word(x[n][3]), normal[n]);
    transpose4<F>(normal[n]);
  }
}

BNN_FAST_END
