// The posterior's standard deviation sigma(rho), its logarithm and their derivatives, for the five meanings of rho:
//
//   softplus  sigma = log(1 + e^rho)    exp  sigma = e^rho    sqrt_exp  sigma = e^(rho/2)
//   square    sigma = rho^2             identity  sigma = rho
//
// log sigma and d log sigma / d rho are computed directly: at rho = -120 sigma has underflowed, yet its logarithm is -120
// and the derivative of that is 1. rho = -inf is a pruned weight: sigma = 0.
//
// The identity's sigma may be negative: it is a factor of the noise, |sigma| the deviation, and log sigma means log |sigma|.
// The last two pass through sigma = 0 at rho = 0, where log sigma is -inf and the KL inf; (log sigma)' = 1 / rho or 2 / rho
// has the sign of that zero.
//
// Where sigma grows exponentially with rho it may overflow, and sigma' with it. Derivatives by rho are therefore summed in
// units of max(sigma, 1), and multiplied by that at the end (in_full): inf - inf and 0 inf do not come up.
#pragma once

#include "elementary.h"

BNN_FAST_BEGIN

enum Scale : int { kSoftplus = 0, kExp = 1, kSqrtExp = 2, kSquare = 3, kIdentity = 4, kScales };

BNN_FN constexpr bool is_exponential(int scale) { return scale == kExp || scale == kSqrtExp; }

template <class Scalar> BNN_FN constexpr Scalar largest() {
  return static_cast<Scalar>(sizeof(Scalar) == 4 ? 3.40282347e38 : 1.7976931348623157e308);
}

// Unused members cost nothing: everything is inlined.
template <class F> struct Spread {
  F sigma, log_sigma;
  F d_sigma;           // sigma' / unit
  F d_log_sigma;       // (log sigma)'
  F inverse_unit;      // 1 / unit, for the others
};

// From a derivative by rho in units to the derivative.
template <class F> BNN_FN F in_full(int scale, F sigma, F by_rho) {
  if (!is_exponential(scale)) return by_rho;  // sigma' does not overflow, and the unit is 1
  return times(by_rho, select(sigma > typename Lane<F>::Scalar(1), sigma, splat<F>(1)));
}

// Far below zero log(log(1 + e^rho)) = rho - e^rho / 2 + ..., and e^rho / 2 is less than half an ulp of rho.
template <class F> BNN_FN auto in_tail(F rho) {
  using Scalar = typename Lane<F>::Scalar;
  return rho < Scalar(sizeof(Scalar) == 4 ? -16 : -37);
}

// rho = -inf
template <class F> BNN_FN auto is_pruned(F rho) {
  return rho < -splat<F>(largest<typename Lane<F>::Scalar>());
}

template <int scale, class F> BNN_FN Spread<F> spread(F rho) {
  using Scalar = typename Lane<F>::Scalar;
  Spread<F> s;
  if constexpr (scale == kSoftplus) {
    // With t = e^-|rho| neither branch of log(1 + e^rho) = max(rho, 0) + log(1 + t) can overflow.
    F zero = splat<F>(0), one = splat<F>(1);
    F t = exp_minus(abs_lane(rho));
    s.sigma = select(rho > Scalar(0), rho, zero) + log1p_lane(t);
    s.d_sigma = quotient(select(rho < Scalar(0), t, one), one + t);
    auto tail = in_tail(rho);
    s.log_sigma = select(tail, rho, log_lane(s.sigma));
    s.d_log_sigma = select(tail, one, quotient(s.d_sigma, s.sigma));
    s.inverse_unit = one;
  } else if constexpr (!is_exponential(scale)) {
    constexpr Scalar power = scale == kSquare ? 2 : 1;
    auto pruned = is_pruned(rho);
    F zero = splat<F>(0), root = select(pruned, zero, rho);
    s.sigma = scale == kSquare ? root * root : root;
    s.d_sigma = scale == kSquare ? root + root : select(pruned, zero, splat<F>(1));
    s.log_sigma = log_magnitude(root) * power;
    s.d_log_sigma = quotient(splat<F>(power), root);
    s.inverse_unit = splat<F>(1);
  } else {
    constexpr Scalar power = scale == kExp ? 1 : 0.5;
    // A finite logarithm, so that the KL of an infinite sigma is inf, not inf - inf.
    F most = splat<F>(largest<Scalar>());
    s.log_sigma = select(rho > most, most, rho) * power;
    s.sigma = exp_lane(s.log_sigma);
    F one = splat<F>(1);
    auto large = s.sigma > Scalar(1);
    s.d_sigma = select(large, one, s.sigma) * power;
    s.d_log_sigma = splat<F>(power);
    s.inverse_unit = select(large, quotient(one, s.sigma), one);
  }
  return s;
}

// log sigma as log(factor) + term, so that several sigmas can share one logarithm. A factor is at least 1e-7; where their
// product overflows, sigma^2 in the KL is beside it by many orders of magnitude.
template <class F> struct LogSigma {
  F factor, term;
};

template <int scale, class F> BNN_FN LogSigma<F> split_log(F rho, const Spread<F>& s) {
  if constexpr (scale == kSoftplus) {
    auto tail = in_tail(rho);
    return {select(tail, splat<F>(1), s.sigma), select(tail, rho, splat<F>(0))};
  } else {
    return {splat<F>(1), s.log_sigma};
  }
}

// sigma^2, the largest number where it overflows: times an input of 0 that is 0.
template <class F> BNN_FN F variance(F sigma) {
  using Scalar = typename Lane<F>::Scalar;
  F most = splat<F>(static_cast<Scalar>(sizeof(Scalar) == 4 ? 1.84467429e19 : 1.3407807929942e154));
  F s = select(sigma > most, most, sigma);
  return s * s;
}

BNN_FAST_END
