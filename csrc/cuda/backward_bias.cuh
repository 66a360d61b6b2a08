// The bias of the fused backward (linear_backward.cu), four outputs to a thread:
//
//   dmu = sum_s sum_b g_sb + k dKL/dmu     drho = sigma' sum_s eps_s sum_b g_sb + k dKL/drho
//
// It has nothing to share with the weights' tiles but g, of which a thread reads its columns once.
#pragma once

#include "quad.cuh"
#include "linear.h"

namespace bnn_fast {
namespace {

// dmu and drho of four biases: dL/dbias_s is the sum of g's rows of sample s.
__device__ void bias_gradient(const LayerBackward& problem, int64_t counter) {
  const Posterior& p = problem.bias;
  Quad quad = quad_at(p, 0, counter);
  float mu[4], rho[4], by_mu[4] = {}, by_sigma[4] = {};
  load_quad<float>(p.mu, p.type, quad, 0.0f, mu);
  load_quad<float>(p.rho, p.type, quad, -INFINITY, rho);
  int divergence = problem.grad_kl.data ? problem.divergence : int(kNone);
  float factor = divergence == kNone ? 0.0f : load_element<float>(problem.grad_kl.data, problem.grad_kl.type, 0);
  float share = factor / static_cast<float>(problem.samples);
  with_scale(p.scale, [&]<int scale>() {
    with_prior<float>(p.prior, p.type, quad, [&](auto prior) {
      Spread<float> spreads[4];
      BNN_UNROLL
      for (int k = 0; k < 4; ++k) spreads[k] = spread<scale>(rho[k]);
      for (int64_t s = 0; s < problem.samples; ++s) {
        float eps[4], grad[4] = {};
        QuadNoise(p).draw<float>(s, 0, counter, eps);
        for (int64_t b = 0; b < problem.batch; ++b) {
          float g[4];
          Quad outputs(problem.samples * problem.batch, p.columns, s * problem.batch + b, quad.index);
          load_quad<float>(problem.grad_y, problem.x_type, outputs, 0.0f, g);
          BNN_UNROLL
          for (int k = 0; k < 4; ++k) grad[k] += g[k];
        }
        BNN_UNROLL
        for (int k = 0; k < 4; ++k) {
          if (divergence == kSampled)
            grad[k] += times(share, kl_by_location(fma_lane(spreads[k].sigma, eps[k], mu[k]), prior(k)));
          by_mu[k] += grad[k];
          by_sigma[k] = fma_lane(grad[k], eps[k], by_sigma[k]);
        }
      }
      BNN_UNROLL
      for (int k = 0; k < 4; ++k) {
        by_sigma[k] *= spreads[k].d_sigma;
        if (divergence == kAnalytic) {
          by_mu[k] += times(factor, kl_by_location(mu[k], prior(k)));
          by_sigma[k] += times(factor, kl_by_rho(spreads[k], prior(k)));
        } else if (divergence == kSampled) {
          by_sigma[k] += times(factor, sampled_kl_by_rho(spreads[k]));
        }
        by_sigma[k] = in_full(p.scale, spreads[k].sigma, by_sigma[k]);
        if (is_pruned(rho[k])) by_mu[k] = by_sigma[k] = 0;
      }
    });
  });
  store_quad<float>(problem.grad_bias_mu, p.type, quad, by_mu);
  store_quad<float>(problem.grad_bias_rho, p.type, quad, by_sigma);
}

}  // namespace
}  // namespace bnn_fast
