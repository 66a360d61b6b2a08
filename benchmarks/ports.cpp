// The arithmetic of a few vectors of weights, straight on, between marks for a model of a processor's ports (ports.py).
#include <cstdint>
#include <cstring>
#include <math.h>
#include <memory>
#include <new>

#include "cpu/gradient.h"

#define BEGIN(name) __asm__ volatile("# LLVM-MCA-BEGIN " name ::: "memory")
#define END() __asm__ volatile("# LLVM-MCA-END" ::: "memory")

using namespace bnn_fast;

using F = f32x16;
constexpr int W = Lane<F>::width;

// Two vectors of counters give eight of normals; w = mu + sigma eps.
extern "C" void draw(const Noise<PhiloxRoundKeys>& noise, uint32_t sample, uint32_t row, uint32_t column, const float* mu,
                     const float* sigma, float* weight) {
  using UInt = Lane<F>::UInt;
  BEGIN("draw");
  UInt rows[2] = {UInt{} + row, UInt{} + row}, columns[2] = {counter_iota<F>() + column, counter_iota<F>() + (column + W)};
  F normal[2][4];
  draw_normals<F, 2>(noise, sample, rows, columns, normal);
  for (int k = 0; k < 8; ++k)
    store<F>(weight + k * W, fma_lane(load<F>(sigma + k * W), normal[k / 4][k % 4], load<F>(mu + k * W)));
  END();
}

// As in sigma_span: four vectors share one logarithm.
extern "C" void sigma_and_kl(const float* mu, const float* rho, const PriorAt<F>& prior, float* sigma, Sum<F>& kl) {
  BEGIN("sigma and KL");
  F product = splat<F>(1), elements = splat<F>(0);
  BNN_UNROLL for (int i = 0; i < 4; ++i) {
    F r = load<F>(rho + i * W);
    Spread<F> s = spread<kSoftplus>(r);
    LogSigma<F> log_sigma = split_log<kSoftplus>(r, s);
    store<F>(sigma + i * W, s.sigma);
    product *= log_sigma.factor;
    elements += select(is_pruned(r), splat<F>(0), kl_analytic(load<F>(mu + i * W), s.sigma, log_sigma.term, prior));
  }
  kl.add(elements - log_lane(product));
  END();
}

// As in GradientSpan: sigma, sigma' and the KL's gradients of four vectors.
extern "C" void gradients(const float* mu, const float* rho, const float* by_weight, const float* eps, const PriorAt<F>& prior, F factor,
                          float* grad_mu, float* grad_rho) {
  BEGIN("gradients from dW and noise");
  BNN_UNROLL for (int i = 0; i < 4; ++i) {
    F r = load<F>(rho + i * W), g = load<F>(by_weight + i * W);
    Spread<F> s = spread<kSoftplus>(r);
    F by_mu = g + times(factor, kl_by_location(load<F>(mu + i * W), prior));
    F by_rho = g * load<F>(eps + i * W) * s.d_sigma + times(factor, kl_by_rho(s, prior));
    auto pruned = is_pruned(r);
    store<F>(grad_mu + i * W, select(pruned, splat<F>(0), by_mu));
    store<F>(grad_rho + i * W, select(pruned, splat<F>(0), by_rho));
  }
  END();
}
