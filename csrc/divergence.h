// The KL divergence of one weight's posterior N(mu, sigma^2) from its prior N(m, t^2).
//
//   analytic  log(t / sigma) + (sigma^2 + (mu - m)^2) / (2 t^2) - 1/2
//   sampled   log q(w) - log p(w) = log(t / sigma) - eps^2 / 2 + (w - m)^2 / (2 t^2)   at w = mu + sigma eps
//             (Blundell et al., "Weight uncertainty in neural networks", 2015, eq. 2)
//
// and their derivatives. Differences are divided by t before they are squared, so that only a result that overflows does.
#pragma once

#include "posterior.h"

BNN_FAST_BEGIN

enum Divergence : int { kNone = 0, kAnalytic = 1, kSampled = 2 };

// A prior at one element: m, 1/t and log t.
template <class F> struct PriorAt {
  F loc, inverse, log_scale;
};

// sum + (sigma^2 + (mu - m)^2) / t^2
template <class F> BNN_FN F add_squares(F mu, F sigma, const PriorAt<F>& prior, F sum) {
  F shift = (mu - prior.loc) * prior.inverse;
  F ratio = sigma * prior.inverse;
  return fma_lane(shift, shift, fma_lane(ratio, ratio, sum));
}

// The analytic KL, with log_sigma in the place of log sigma.
template <class F> BNN_FN F kl_analytic(F mu, F sigma, F log_sigma, const PriorAt<F>& prior) {
  using Scalar = typename Lane<F>::Scalar;
  return fma_lane(add_squares(mu, sigma, prior, splat<F>(-1)), splat<F>(Scalar(0.5)), prior.log_scale - log_sigma);
}
template <class F> BNN_FN F kl_analytic(F mu, const Spread<F>& s, const PriorAt<F>& prior) {
  return kl_analytic(mu, s.sigma, s.log_sigma, prior);
}

template <class F> BNN_FN F kl_sampled(F weight, F noise, F log_sigma, const PriorAt<F>& prior) {
  using Scalar = typename Lane<F>::Scalar;
  F shift = (weight - prior.loc) * prior.inverse;
  F squares = fma_lane(shift, shift, -(noise * noise));
  return fma_lane(squares, splat<F>(Scalar(0.5)), prior.log_scale - log_sigma);
}

// (value - m) / t^2: the derivative of the analytic KL by mu (value = mu), of the sampled one by w (value = w).
template <class F> BNN_FN F kl_by_location(F value, const PriorAt<F>& prior) {
  return (value - prior.loc) * prior.inverse * prior.inverse;
}

// The derivative of the analytic KL by rho, in units (posterior.h): sigma sigma' / t^2 - (log sigma)'.
template <class F> BNN_FN F kl_by_rho(const Spread<F>& s, const PriorAt<F>& prior) {
  return fma_lane(s.sigma * prior.inverse, s.d_sigma * prior.inverse, -s.d_log_sigma * s.inverse_unit);
}

// What is left of it of the sampled KL, whose other terms come by way of the weights.
template <class F> BNN_FN F sampled_kl_by_rho(const Spread<F>& s) { return -s.d_log_sigma * s.inverse_unit; }

BNN_FAST_END
