// The gradients of four parameters of one row, of the draws that they had part in, with those of their KL:
//
//   dmu = sum_s dW_s + k dKL/dmu     drho = sigma' sum_s dW_s eps_s + k dKL/drho
//
// With the sampled divergence k dKL_s/dw_s / S is added to dW_s, and only -(log sigma)' is left in dKL/drho.
#pragma once

#include "quad.cuh"

namespace bnn_fast {

// k: the gradient that reaches the KL. of_draw(s, eps, dW) gives the noise of draw s, and adds its gradient to the four of dW, which are 0.
template <class F, class OfDraw>
__device__ void quad_gradient(const Posterior& p, int divergence, F k, int64_t row, int64_t counter, int64_t first, int64_t samples,
                              OfDraw of_draw, F (&by_mu)[4], F (&by_rho)[4]) {
  Quad quad = quad_at(p, row, counter);
  F mu[4], rho[4];
  load_quad<F>(p.mu, p.type, quad, F(0), mu);
  load_quad<F>(p.rho, p.type, quad, F(-INFINITY), rho);
  F share = k / static_cast<F>(samples);
  BNN_UNROLL
  for (int n = 0; n < 4; ++n) by_mu[n] = by_rho[n] = 0;
  with_scale(p.scale, [&]<int scale>() {
    with_prior<F>(p.prior, p.type, quad, [&](auto prior) {
      Spread<F> spreads[4];
      BNN_UNROLL
      for (int n = 0; n < 4; ++n) spreads[n] = spread<scale>(rho[n]);
      for (int64_t s = first; s < first + samples; ++s) {
        F eps[4], grad[4] = {};
        of_draw(s, eps, grad);
        BNN_UNROLL
        for (int n = 0; n < 4; ++n) {
          if (divergence == kSampled) grad[n] += times(share, kl_by_location(fma_lane(spreads[n].sigma, eps[n], mu[n]), prior(n)));
          by_mu[n] += grad[n];
          by_rho[n] = fma_lane(grad[n], eps[n], by_rho[n]);
        }
      }
      BNN_UNROLL
      for (int n = 0; n < 4; ++n) {
        by_rho[n] *= spreads[n].d_sigma;
        if (divergence == kAnalytic) {
          by_mu[n] += times(k, kl_by_location(mu[n], prior(n)));
          by_rho[n] += times(k, kl_by_rho(spreads[n], prior(n)));
        } else if (divergence == kSampled) {
          by_rho[n] += times(k, sampled_kl_by_rho(spreads[n]));
        }
        by_rho[n] = in_full(p.scale, spreads[n].sigma, by_rho[n]);
        if (is_pruned(rho[n])) by_mu[n] = by_rho[n] = 0;
      }
    });
  });
}

}  // namespace bnn_fast
