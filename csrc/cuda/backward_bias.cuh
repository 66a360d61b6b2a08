// The bias of the fused backward (linear_backward.cu), four outputs to a thread:
//
//   dmu = sum_s sum_b g_sb + k dKL/dmu     drho = sigma' sum_s eps_s sum_b g_sb + k dKL/drho
//
// It has nothing to share with the weights' tiles but g, of which a thread reads its columns once.
#pragma once

#include "linear.h"
#include "quad_gradient.cuh"

namespace bnn_fast {
namespace {

// dmu and drho of four biases: dL/dbias_s is the sum of g's rows of sample s.
__device__ void bias_gradient(const LayerBackward& problem, int64_t counter) {
  const Posterior& p = problem.bias;
  Quad quad = quad_at(p, 0, counter);
  int divergence = problem.grad_kl.data ? problem.divergence : int(kNone);
  float k = divergence == kNone ? 0.0f : load_element<float>(problem.grad_kl.data, problem.grad_kl.type, 0);
  float by_mu[4], by_rho[4];
  quad_gradient<float>(p, divergence, k, 0, counter, 0, problem.samples, [&](int64_t s, float (&eps)[4], float (&grad)[4]) {
    QuadNoise(p).draw(s, 0, counter, eps);
    for (int64_t b = 0; b < problem.batch; ++b) {
      float g[4];
      Quad outputs(problem.samples * problem.batch, p.columns, s * problem.batch + b, quad.index);
      load_quad<float>(problem.grad_y, problem.x_type, outputs, 0.0f, g);
      BNN_UNROLL
      for (int n = 0; n < 4; ++n) grad[n] += g[n];
    }
  }, by_mu, by_rho);
  store_quad<float>(problem.grad_bias_mu, p.type, quad, by_mu);
  store_quad<float>(problem.grad_bias_rho, p.type, quad, by_rho);
}

}  // namespace
}  // namespace bnn_fast
