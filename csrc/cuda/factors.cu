// The factors of a noisy layer's noise (../noisy.h), f(e) = sign(e) sqrt |e| of normals, a quad to a thread.
#include <cuda_runtime.h>

#include "quad.cuh"
#include "sample_normal.h"

namespace bnn_fast {
namespace {

constexpr int kThreads = 256;

template <class F> __global__ void __launch_bounds__(kThreads) factors_kernel(Posterior normals, void* factors) {
  int64_t counter = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (counter >= quads_in_row(normals)) return;
  F f[4];
  QuadNoise(normals).normals<F>(0, 0, counter, f);
  BNN_UNROLL
  for (int k = 0; k < 4; ++k) f[k] = copysign(sqrt(abs_lane(f[k])), f[k]);
  store_quad<F>(factors, kTypeOf<F>, quad_at(normals, 0, counter), f);
}

}  // namespace

extern "C" cudaError_t bnn_fast_cuda_factors(const Posterior* normals, void* factors, void* stream) {
  int64_t blocks = (quads_in_row(*normals) + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  auto kernel = normals->type == Type::kFloat64 ? factors_kernel<double> : factors_kernel<float>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*normals, factors);
  return cudaGetLastError();
}

}  // namespace bnn_fast
