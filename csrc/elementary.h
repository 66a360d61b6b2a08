// exp, log and log1p from fma alone, so that the CPU (any vector width) and every GPU give the same bits.
// Coefficients are minimax fits in float32 on the reduced range. double uses the C library (a few ulp).
#pragma once

#include "lane.h"

BNN_FAST_BEGIN

// a b, and 0 for a = 0 even if b has overflowed.
template <class F> BNN_FN F times(F a, F b) {
  return select(a == typename Lane<F>::Scalar(0), a, a * b);
}

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]:  f + f^2 q(f).
template <class F> BNN_FN F log1p_reduced(F f) {
  F q = splat<F>(0.0873517096f);
  q = fma_lane(q, f, splat<F>(-0.143077493f));
  q = fma_lane(q, f, splat<F>(0.149179384f));
  q = fma_lane(q, f, splat<F>(-0.165704682f));
  q = fma_lane(q, f, splat<F>(0.199620739f));
  q = fma_lane(q, f, splat<F>(-0.250017583f));
  q = fma_lane(q, f, splat<F>(0.333339512f));
  q = fma_lane(q, f, splat<F>(-0.499999911f));
  return fma_lane(f * f, q, f);
}

// x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), for positive normal x. f is exact. exponent: 2^23 e, as it stands in the
// bits of a float; whoever uses it scales a coefficient by 2^-23.
template <class F> BNN_FN F split_exponent(F x, typename Lane<F>::Int& exponent) {
  using Int = typename Lane<F>::Int;
  Int bits = bit_cast<Int>(x);
  exponent = (bits - 0x3f3504f3) & ~0x7fffff;
  return bit_cast<F>(bits - exponent) - 1.0f;
}

// log x for positive normal x; finite for infinite x (128 log 2 in float), so that a KL never becomes inf - inf.
template <class F> BNN_FN F log_lane(F x) {
  typename Lane<F>::Int exponent;
  F f = split_exponent(x, exponent);
  return fma_lane(to_floating<F>(exponent), splat<F>(0.693147182f * 0x1p-23f), log1p_reduced(f));
}
BNN_FN double log_lane(double x) { return log(x > 1.7976931348623157e308 ? 1.7976931348623157e308 : x); }

// log |x| for any x, subnormal ones too; -inf for 0.
template <class F> BNN_FN F log_magnitude(F x) {
  F magnitude = abs_lane(x);
  auto small = magnitude < 1.17549435e-38f;
  F l = log_lane(select(small, magnitude * 0x1p24f, magnitude)) - select(small, splat<F>(16.6355324f), splat<F>(0));
  return select(magnitude == 0.0f, splat<F>(-INFINITY), l);
}
BNN_FN double log_magnitude(double x) { return log_lane(fabs(x)); }

// log(1 + t) for t in [0, 1], right in the relative sense down to the smallest t.
template <class F> BNN_FN F log1p_lane(F t) {
  auto halve = t > 0.414213538f;  // 1 + t = 2 (1 + (t - 1)/2)
  F l = log1p_reduced(select(halve, fma_lane(t, splat<F>(0.5f), splat<F>(-0.5f)), t));
  return select(halve, l + 0.693147182f, l);
}
BNN_FN double log1p_lane(double t) { return log1p(t); }

// e^r - 1 for |r| <= log(2)/2.
template <class F> BNN_FN F expm1_reduced(F r) {
  F q = splat<F>(0.00138164358f);
  q = fma_lane(q, r, splat<F>(0.00836874731f));
  q = fma_lane(q, r, splat<F>(0.0416683480f));
  q = fma_lane(q, r, splat<F>(0.166665196f));
  q = fma_lane(q, r, splat<F>(0.499999940f));
  return fma_lane(r * r, q, r);
}

template <class F> BNN_FN F exp_reduced(F r) { return expm1_reduced(r) + 1.0f; }

// e^x = 2^n e^r. 2^n is applied in two factors, so that results near the ends of the range are rounded once: denormal below,
// inf above.
template <class F> BNN_FN F exp_lane(F x) {
  using Int = typename Lane<F>::Int;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = select(x < -105.0f, splat<F>(-105.0f), x);
  x = select(x > 89.0f, splat<F>(89.0f), x);
  F shifted = fma_lane(x, splat<F>(1.44269502f), splat<F>(magic));
  F n = shifted - magic;
  F r = fma_lane(n, splat<F>(-0.693145752f), x);
  F p = exp_reduced(fma_lane(n, splat<F>(-1.42860677e-6f), r));
  Int power = bit_cast<Int>(shifted) - bit_cast<int32_t>(magic);
  Int half = power >> 1;
  F scale0 = bit_cast<F>((half + 127) << 23);
  F scale1 = bit_cast<F>((power - half + 127) << 23);
  return p * scale0 * scale1;
}
BNN_FN double exp_lane(double x) { return exp(x); }

// The bits of exp_lane(-x) for x >= 0, in fewer instructions: the factors are 2^-64 and 2^(n + 64), whose exponent stands ready in
// the low bits of n + magic.
template <class F> BNN_FN F exp_minus(F x) {
  constexpr float magic = 12582912.0f + 127 + 64;
  x = select(x > 105.0f, splat<F>(105.0f), x);
  F shifted = fma_lane(x, splat<F>(-1.44269502f), splat<F>(magic));
  F n = shifted - magic;
  F r = fma_lane(n, splat<F>(-0.693145752f), -x);
  F p = exp_reduced(fma_lane(n, splat<F>(-1.42860677e-6f), r));
  return p * bit_cast<F>(bit_cast<typename Lane<F>::Int>(shifted) << 23) * 0x1p-64f;
}
BNN_FN double exp_minus(double x) { return exp(-x); }

BNN_FAST_END
