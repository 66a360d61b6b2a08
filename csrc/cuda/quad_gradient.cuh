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

// What the lanes of a warp have of gradients that were summed in parts, chunks of each sample. lanes: those that share a sample, a power of two.
// add_parts(s, chunk, gradient) adds one to the four. use(s, gradient) takes what a lane has of a sample's.
template <class F, class AddParts, class Use>
__device__ __forceinline__ void for_parts(int64_t samples, int chunks, int lanes, AddParts add_parts, Use use) {
  for (int64_t s = threadIdx.x / lanes; s < samples; s += 32 / lanes) {
    F gradient[4] = {};
#pragma unroll 4
    for (int chunk = threadIdx.x % lanes; chunk < chunks; chunk += lanes) add_parts(s, chunk, gradient);
    use(s, gradient);
  }
}
template <class F> __device__ __forceinline__ void sum_lanes(F (&values)[4]) {
  for (int step = 16; step > 0; step /= 2)
    for (int n = 0; n < 4; ++n) values[n] += __shfl_xor_sync(kAllLanes, values[n], step);
}

// The gradients above by a warp, each of whose lanes has some of the samples, or of their parts; in all lanes. The parts are added before sigma is
// computed, so that their loads do not wait for rho's.
template <class F, class AddParts>
__device__ __forceinline__ void warp_gradient(const Posterior& p, int divergence, const KlGradient& grad_kl, int64_t row, int64_t counter,
                                              int64_t samples, int chunks, int lanes, AddParts add_parts, F (&by_mu)[4], F (&by_rho)[4]) {
  Quad quad = quad_at(p, row, counter);
  QuadNoise noise(p);
  F mu[4], rho[4], eps[4];
  load_quad<F>(p.mu, p.type, quad, F(0), mu);
  load_quad<F>(p.rho, p.type, quad, F(-INFINITY), rho);
  if (!grad_kl.data) divergence = kNone;
  F k = grad_kl.data ? load_element<F>(grad_kl.data, grad_kl.type, 0) : F(0);
  for (int n = 0; n < 4; ++n) by_mu[n] = by_rho[n] = 0;
  for_parts<F>(samples, chunks, lanes, add_parts, [&](int64_t s, const F (&gradient)[4]) {
    noise.draw<F>(s, row, counter, eps);
    for (int n = 0; n < 4; ++n) {
      by_mu[n] += gradient[n];
      by_rho[n] += gradient[n] * eps[n];
    }
  });

  Spread<F> spreads[4];
  with_scale(p.scale, [&]<int scale>() {
    for (int n = 0; n < 4; ++n) spreads[n] = spread<scale>(rho[n]);
  });
  PriorAt<F> prior[4];
  with_prior<F>(p.prior, p.type, quad, [&](auto prior_of) {
    for (int n = 0; n < 4; ++n) prior[n] = prior_of(n);
  });
  for (int64_t s = threadIdx.x; divergence == kSampled && s < samples; s += 32) {
    noise.normals<F>(s, row, counter, eps);
    for (int n = 0; n < 4; ++n) {
      F weight = fma_lane(spreads[n].sigma, eps[n], mu[n]);
      F gradient = times(k / static_cast<F>(samples), kl_by_location(weight, prior[n]));
      by_mu[n] += gradient;
      by_rho[n] += gradient * eps[n];
    }
  }
  sum_lanes(by_mu);
  sum_lanes(by_rho);
  for (int n = 0; n < 4; ++n) {
    F kl_mu = 0, kl_rho = 0;
    if (divergence == kAnalytic) {
      kl_mu = times(k, kl_by_location(mu[n], prior[n]));
      kl_rho = times(k, kl_by_rho(spreads[n], prior[n]));
    } else if (divergence == kSampled) {
      kl_rho = times(k, sampled_kl_by_rho(spreads[n]));
    }
    bool pruned = is_pruned(rho[n]);
    by_mu[n] = select(pruned, F(0), by_mu[n] + kl_mu);
    by_rho[n] = select(pruned, F(0), in_full(p.scale, spreads[n].sigma, by_rho[n] * spreads[n].d_sigma + kl_rho));
  }
}

}  // namespace bnn_fast
