// Sampling a tensor's weights on the GPU, with the KL of its elements.
//
//   w_s[r, c] = mu[r, c] + sigma(rho[r, c]) eps(seed, s, r, c)        kl = sum_rc KL(N(mu, sigma^2) || prior)
//
// A thread owns one Philox counter: four columns of one row. It computes sigma and the KL of its elements once,
// then walks the samples. Each block reduces its KL in double, in thread order, and writes one number;
// a second launch adds those in block order, so the sum has the same bits in every run.
#include <cuda_runtime.h>

#include "../divergence.h"
#include "../normal.h"
#include "sample_normal.h"

namespace bnn_fast {
namespace {

constexpr int kThreads = 256;

__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (double warp : warps) sum += warp;
  return sum;
}

__device__ PriorAt<float> prior_at(const Prior& prior, int64_t i) {
  float loc = prior.loc_tensor ? static_cast<const float*>(prior.loc_tensor)[i] : static_cast<float>(prior.loc);
  float scale = prior.scale_tensor ? static_cast<const float*>(prior.scale_tensor)[i] : static_cast<float>(prior.scale);
  return {loc, 1.0f / scale, log_lane(scale)};
}

__device__ Spread<float> spread_at(int scale, float rho) {
  return scale == kSoftplus ? spread<kSoftplus>(rho) : scale == kExp ? spread<kExp>(rho) : spread<kSqrtExp>(rho);
}

__global__ void __launch_bounds__(kThreads) sample_normal_kernel(SampleForward problem, int64_t counters) {
  const Posterior& p = problem.posterior;
  int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  int64_t shift = p.column_offset & 3, elements = p.rows * p.columns;
  double kl = 0;
  if (thread < p.rows * counters) {
    int64_t row = thread / counters, first = thread % counters * 4 - shift;
    const float* mu = static_cast<const float*>(p.mu) + row * p.columns;
    const float* rho = static_cast<const float*>(p.rho) + row * p.columns;
    float location[4], sigma[4], log_sigma[4];
    bool counted[4];
    for (int k = 0; k < 4; ++k) {
      int64_t column = first + k;
      bool inside = column >= 0 && column < p.columns;
      location[k] = inside ? mu[column] : 0.0f;
      float r = inside ? rho[column] : 0.0f;
      Spread<float> s = spread_at(p.scale, r);
      sigma[k] = s.sigma;
      log_sigma[k] = s.log_sigma;
      counted[k] = inside && !is_pruned(r);
      if (problem.divergence == kAnalytic && counted[k])
        kl += kl_analytic(location[k], s, prior_at(p.prior, row * p.columns + column));
    }
    uint64_t seed = static_cast<uint64_t>(p.key[0]);
    Noise noise{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), p.stream};
    uint32_t counter = static_cast<uint32_t>((p.column_offset >> 2) + thread % counters);
    for (int64_t s = 0; s < problem.samples; ++s) {
      float eps[4];
      draw_normals<float>(noise, static_cast<uint32_t>(p.key[1] + s), static_cast<uint32_t>(p.row_offset + row), counter, eps);
      float* weight = static_cast<float*>(problem.weight) + s * elements + row * p.columns;
      for (int k = 0; k < 4; ++k) {
        int64_t column = first + k;
        if (column < 0 || column >= p.columns) continue;
        float w = fma_lane(sigma[k], eps[k], location[k]);
        weight[column] = w;
        if (problem.divergence == kSampled && counted[k])
          kl += kl_sampled(w, eps[k], log_sigma[k], prior_at(p.prior, row * p.columns + column));
      }
    }
  }
  if (!problem.kl) return;
  double sum = block_sum(kl);
  if (threadIdx.x == 0) problem.kl[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const double* parts, int64_t count, double factor, float* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += parts[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = static_cast<float>(sum * factor);
}

int64_t counters_of(const Posterior& p) { return ((p.column_offset & 3) + p.columns + 3) / 4; }

}  // namespace

extern "C" int64_t bnn_fast_cuda_sample_normal_blocks(const SampleForward* problem) {
  const Posterior& p = problem->posterior;
  return (p.rows * counters_of(p) + kThreads - 1) / kThreads;
}

extern "C" cudaError_t bnn_fast_cuda_sample_normal(const SampleForward* problem, float* kl, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  int64_t blocks = bnn_fast_cuda_sample_normal_blocks(problem);
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (blocks > 0) {
    sample_normal_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(*problem, counters_of(problem->posterior));
    if (cudaError_t error = cudaGetLastError()) return error;
  }
  double factor = problem->divergence == kSampled ? 1.0 / static_cast<double>(problem->samples) : 1.0;
  sum_kernel<<<1, kThreads, 0, queue>>>(problem->kl, problem->kl ? blocks : 0, factor, kl);
  return cudaGetLastError();
}

}  // namespace bnn_fast
