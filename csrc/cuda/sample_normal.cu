// Sampling a tensor's weights on the GPU with the KL of its elements, forward and backward.
//
//   forward    w_s = mu + sigma(rho) eps_s      kl = sum of KL(N(mu, sigma^2) || prior), or of its value at w_s
//   backward   dmu = sum_s dW_s + k dKL/dmu     drho = sigma' sum_s dW_s eps_s + k dKL/drho
//
// With the sampled divergence k dKL_s/dw_s / S is added to dW_s, and only -(log sigma)' is left in dKL/drho. Of the estimators
// "local" and "flipout" the forward gives sigma^2 and sigma eps_s, and the backward takes M and D (../cpu/gradient.h).
//
// A thread takes every n-th quad, n threads in all: neighbouring threads read neighbouring memory. For each it
// computes sigma once and walks the samples; the backward draws the noise again. Each block writes its part of the
// KL as one number, and sum_values.cu adds these. The grid depends on the shape alone and every order is fixed,
// so all results have the same bits in every run, on every GPU.
#include <cuda_runtime.h>

#include <type_traits>

#include "quad.cuh"
#include "sample_normal.h"

namespace bnn_fast {
namespace {

constexpr int kThreads = 256;
// Four full waves of four blocks on each of an H200's 132 multiprocessors.
constexpr int64_t kMostBlocks = 4 * 4 * 132;

// What registers are limited for: half of a multiprocessor's threads (1536 in some architectures, 2048 in others),
// less for ragged quads and for double.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kHalfOfThreads = 1536 / 2 / kThreads;
#else
constexpr int kHalfOfThreads = 2048 / 2 / kThreads;
#endif
template <class F, class AnyQuad>
constexpr int kBlocksPerProcessor =
    sizeof(F) == 8 ? 1 : std::is_same_v<AnyQuad, WholeQuad> ? kHalfOfThreads : 2;

// How threads walk over the quads of all rows, end to end: from one of a thread's quads to its next, row and counter
// advance by fixed amounts, so that nothing is divided on the way.
struct Walk {
  uint32_t blocks = 0;
  uint32_t rounds, last;          // quads of a thread: one less from thread `last` on
  uint32_t per_row;               // quads, or as many as 32 bits hold
  uint32_t rows, counters, wrap;  // of one step; from counter `wrap` on it ends one row further

  explicit Walk(const Posterior& p) {
    int64_t in_row = quads_in_row(p), quads = p.rows * in_row;
    if (quads == 0) return;
    int64_t wanted = (quads + kThreads - 1) / kThreads;
    blocks = static_cast<uint32_t>(wanted < kMostBlocks ? wanted : kMostBlocks);
    int64_t step = static_cast<int64_t>(blocks) * kThreads;
    rounds = static_cast<uint32_t>((quads + step - 1) / step);
    last = static_cast<uint32_t>(quads - (rounds - 1) * step);
    per_row = static_cast<uint32_t>(in_row < UINT32_MAX ? in_row : UINT32_MAX);
    rows = static_cast<uint32_t>(step / in_row);
    counters = static_cast<uint32_t>(step % in_row);
    wrap = static_cast<uint32_t>(in_row - counters);
  }
};

// What a kernel is given. The logarithm and division of a prior made of numbers are done once, on the host.
template <class F, class P> struct Work {
  P problem;
  Walk walk;
  PriorAt<F> prior;
  int64_t elements;
};

// Calls body(quad, row, counter) for a thread's quads.
template <class AnyQuad, class Body>
__device__ __forceinline__ void for_quads(const Posterior& p, const Walk& walk, Body body) {
  uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  uint32_t row = thread / walk.per_row, counter = thread % walk.per_row;
  for (uint32_t left = walk.rounds - (thread >= walk.last); left > 0; --left) {
    if constexpr (std::is_same_v<AnyQuad, WholeQuad>)
      body(WholeQuad{(static_cast<int64_t>(row) * walk.per_row + counter) * 4}, row, counter);
    else
      body(quad_at(p, row, counter), row, counter);
    bool wraps = counter >= walk.wrap;
    counter += wraps ? -walk.wrap : walk.counters;
    row += walk.rows + wraps;
  }
}

template <class F> __device__ F load_number(const void* data, Type type) {
  if (type == Type::kFloat64) return static_cast<F>(load_element<double>(data, type, 0));
  return static_cast<F>(load_element<float>(data, type, 0));
}

template <class F, class AnyQuad>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<F, AnyQuad>)
    sample_forward_kernel(const __grid_constant__ Work<F, SampleForward> work) {
  const SampleForward& problem = work.problem;
  const Posterior& p = problem.posterior;
  const int divergence = problem.divergence;
  const auto samples = static_cast<uint32_t>(problem.samples);
  const bool local = problem.estimator == kLocal, flipout = problem.estimator == kFlipout;
  QuadNoise noise(p);
  double kl = 0;
  for_quads<AnyQuad>(p, work.walk, [&](AnyQuad q, uint32_t row, uint32_t counter) {
    F mu[4], rho[4], sigma[4];
    F log_sigma[4], log_product = 0;  // of sigma as split_log has it; one logarithm does for the four
    load_quad<F>(p.mu, p.type, q, F(0), mu);
    load_quad<F>(p.rho, p.type, q, F(-INFINITY), rho);
    with_scale(p.scale, [&]<int scale>() {
      Spread<F> s[4];
      for (int k = 0; k < 4; ++k) {
        s[k] = spread<scale>(rho[k]);
        sigma[k] = s[k].sigma;
      }
      if (divergence == kAnalytic) {
        with_prior<F>(p.prior, work.prior, p.type, q,
                      [&](auto prior) { kl += static_cast<double>(quad_kl<scale>(mu, rho, s, prior)); });
      } else if (divergence == kSampled) {
        F product = 1;
        for (int k = 0; k < 4; ++k) {
          LogSigma<F> split = split_log<scale>(rho[k], s[k]);
          product *= split.factor;
          log_sigma[k] = split.term;
        }
        if (scale == kSoftplus) log_product = log_lane(product);
      }
    });
    if (local) {
      F square[4];
      for (int k = 0; k < 4; ++k) square[k] = variance(sigma[k]);
      if (problem.weight) store_quad<F>(problem.weight, problem.weight_type, q, square);
      if (divergence != kSampled) return;
    }
    AnyQuad at = q;  // in the weights of sample s
    for (uint32_t s = 0; s < samples; ++s, at.index += work.elements) {
      F eps[4], w[4], drawn[4];
      noise.draw(s, row, counter, eps);
      for (int k = 0; k < 4; ++k) {
        w[k] = fma_lane(sigma[k], eps[k], mu[k]);
        drawn[k] = flipout ? sigma[k] * eps[k] : w[k];
      }
      if (problem.weight && !local) store_quad<F>(problem.weight, problem.weight_type, at, drawn);
      if (divergence != kSampled) continue;
      with_prior<F>(p.prior, work.prior, p.type, q, [&](auto prior) {
        F sum = -log_product;
        for (int k = 0; k < 4; ++k)
          sum += select(is_pruned(rho[k]), F(0), kl_sampled(w[k], eps[k], log_sigma[k], prior(k)));
        kl += static_cast<double>(sum);
      });
    }
  });
  if (!problem.kl) return;
  double sum = block_sum(kl);
  if (threadIdx.x == 0) problem.kl[blockIdx.x] = sum;
}

template <class F, class AnyQuad>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<F, AnyQuad>)
    sample_backward_kernel(const __grid_constant__ Work<F, SampleBackward> work) {
  const SampleBackward& problem = work.problem;
  const Posterior& p = problem.posterior;
  const KlGradient& grad_kl = problem.grad_kl;
  const int divergence = problem.divergence;
  const auto samples = static_cast<uint32_t>(problem.samples);
  const bool local = problem.estimator == kLocal, flipout = problem.estimator == kFlipout;
  const void* by_draw = flipout ? problem.grad_second : local ? nullptr : problem.grad_weight;  // a gradient for each draw
  QuadNoise noise(p);
  F number = grad_kl.data && !grad_kl.elementwise ? load_number<F>(grad_kl.data, grad_kl.type) : F(0);
  if (divergence == kSampled) number /= static_cast<F>(samples);
  for_quads<AnyQuad>(p, work.walk, [&](AnyQuad q, uint32_t row, uint32_t counter) {
    F mu[4], rho[4], sigma[4], d_sigma[4];
    F d_mu[4] = {}, d_rho[4] = {};  // the KL's own part at first; by rho in units (posterior.h)
    uint32_t pruned = 0;            // by bits: one register to keep, not rho's four
    load_quad<F>(p.mu, p.type, q, F(0), mu);
    load_quad<F>(p.rho, p.type, q, F(-INFINITY), rho);
    with_scale(p.scale, [&]<int scale>() {
      Spread<F> s[4];
      for (int k = 0; k < 4; ++k) {
        s[k] = spread<scale>(rho[k]);
        sigma[k] = s[k].sigma;
        d_sigma[k] = s[k].d_sigma;
        pruned |= static_cast<uint32_t>(is_pruned(rho[k])) << k;
      }
      if (divergence == kAnalytic) {
        F factor[4] = {number, number, number, number};
        if (grad_kl.elementwise) load_quad<F>(grad_kl.data, grad_kl.type, q, F(0), factor);
        with_prior<F>(p.prior, work.prior, p.type, q, [&](auto prior) {
          for (int k = 0; k < 4; ++k) {
            d_mu[k] = times(factor[k], kl_by_location(mu[k], prior(k)));
            d_rho[k] = times(factor[k], kl_by_rho(s[k], prior(k)));
          }
        });
      } else if (divergence == kSampled) {
        for (int k = 0; k < 4; ++k) d_rho[k] = times(number * static_cast<F>(samples), sampled_kl_by_rho(s[k]));
      }
    });
    if (problem.estimator != kWeight && problem.grad_weight) {
      F of_mu[4], second[4] = {};
      load_quad<F>(problem.grad_weight, kTypeOf<F>, q, F(0), of_mu);
      if (local) load_quad<F>(problem.grad_second, kTypeOf<F>, q, F(0), second);
      for (int k = 0; k < 4; ++k) {
        d_mu[k] += of_mu[k];
        d_rho[k] = fma_lane(times(second[k], sigma[k]), d_sigma[k], d_rho[k]);
      }
    }
    for (uint32_t s = 0; s < samples; ++s) {
      F eps[4], g[4] = {}, of_kl[4] = {};  // by the weights, and what of it comes from the KL
      AnyQuad at = q;  // in the weights of sample s
      at.index += s * work.elements;
      if (by_draw) load_quad<F>(by_draw, problem.weight_type, at, F(0), g);
      noise.draw(s, row, counter, eps);
      if (divergence == kSampled)
        with_prior<F>(p.prior, work.prior, p.type, q, [&](auto prior) {
          for (int k = 0; k < 4; ++k)
            of_kl[k] = times(number, kl_by_location(fma_lane(sigma[k], eps[k], mu[k]), prior(k)));
        });
      for (int k = 0; k < 4; ++k) {
        g[k] += of_kl[k];
        d_mu[k] += flipout ? of_kl[k] : g[k];
        d_rho[k] = fma_lane(g[k] * eps[k], d_sigma[k], d_rho[k]);
      }
    }
    for (int k = 0; k < 4; ++k) {
      bool is_zero = pruned >> k & 1;
      d_mu[k] = select(is_zero, F(0), d_mu[k]);
      d_rho[k] = select(is_zero, F(0), in_full(p.scale, sigma[k], d_rho[k]));
    }
    store_quad<F>(problem.grad_mu, p.type, q, d_mu);
    store_quad<F>(problem.grad_rho, p.type, q, d_rho);
  });
}

template <class F, class AnyQuad>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<F, AnyQuad>)
    kl_elements_kernel(const __grid_constant__ Work<F, KlElements> work) {
  const KlElements& problem = work.problem;
  const Posterior& p = problem.posterior;
  for_quads<AnyQuad>(p, work.walk, [&](AnyQuad q, uint32_t, uint32_t) {
    F mu[4], rho[4], kl[4];
    load_quad<F>(p.mu, p.type, q, F(0), mu);
    load_quad<F>(p.rho, p.type, q, F(-INFINITY), rho);
    with_scale(p.scale, [&]<int scale>() {
      with_prior<F>(p.prior, work.prior, p.type, q, [&](auto prior) {
        for (int k = 0; k < 4; ++k)
          kl[k] = select(is_pruned(rho[k]), F(0), kl_analytic(mu[k], spread<scale>(rho[k]), prior(k)));
      });
    });
    store_quad<F>(problem.kl, p.type, q, kl);
  });
}

template <class F, class P>
cudaError_t launch(void (*kernel)(Work<F, P>), const P& problem, cudaStream_t stream) {
  const Posterior& p = problem.posterior;
  F loc = static_cast<F>(p.prior.loc), inverse = static_cast<F>(1 / p.prior.scale);
  Work<F, P> work{
      problem, Walk(p), {loc, inverse, static_cast<F>(log(p.prior.scale))}, p.rows * p.columns};
  if (work.walk.blocks == 0) return cudaSuccess;
  kernel<<<work.walk.blocks, kThreads, 0, stream>>>(work);
  return cudaGetLastError();
}

// Whether all quads are WholeQuads in the posterior's tensors and in those given.
bool whole(const Posterior& p, std::initializer_list<const void*> tensors) {
  return all_aligned(p, {p.mu, p.rho, p.prior.loc_tensor, p.prior.scale_tensor}) && all_aligned(p, tensors);
}

}  // namespace

extern "C" int64_t bnn_fast_cuda_sample_forward_blocks(const SampleForward* problem) {
  return Walk(problem->posterior).blocks;
}

extern "C" cudaError_t bnn_fast_cuda_sample_forward(const SampleForward* problem, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  if (problem->posterior.type == Type::kFloat64)
    return launch(sample_forward_kernel<double, Quad>, *problem, queue);
  if (!whole(problem->posterior, {problem->weight}))
    return launch(sample_forward_kernel<float, Quad>, *problem, queue);
  return launch(sample_forward_kernel<float, WholeQuad>, *problem, queue);
}

extern "C" cudaError_t bnn_fast_cuda_sample_backward(const SampleBackward* given, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  SampleBackward problem = *given;
  if (!problem.grad_kl.data) problem.divergence = kNone;
  bool draws = problem.divergence == kSampled || (problem.estimator != kLocal && problem.grad_weight);
  if (!draws) problem.samples = 0;
  if (problem.posterior.type == Type::kFloat64)
    return launch(sample_backward_kernel<double, Quad>, problem, queue);
  if (!whole(problem.posterior, {problem.grad_weight, problem.grad_second, problem.grad_mu, problem.grad_rho}))
    return launch(sample_backward_kernel<float, Quad>, problem, queue);
  return launch(sample_backward_kernel<float, WholeQuad>, problem, queue);
}

extern "C" cudaError_t bnn_fast_cuda_kl_elements(const KlElements* problem, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  if (problem->posterior.type == Type::kFloat64)
    return launch(kl_elements_kernel<double, Quad>, *problem, queue);
  return launch(kl_elements_kernel<float, Quad>, *problem, queue);
}

}  // namespace bnn_fast
