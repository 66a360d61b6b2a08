// What the fused kernels of the estimators share (estimated_forward.cu, estimated_backward.cu).
#pragma once

#include "estimated.h"
#include "tile.cuh"

namespace bnn_fast {
namespace {

// A warp's tile of what both products are by.
struct Factors {
  float4 mu[kQuads], q[kQuads];
};

// q of a quad, by which the second product is: sigma^2 of local, sigma eps of flipout. eps: of flipout alone.
template <int estimator> __device__ __forceinline__ float second_factor(float sigma, float eps) {
  if constexpr (estimator == kLocal)
    return variance(sigma);
  else
    return sigma * eps;
}

// The derivative of q by sigma, of local half of it, as the other half is in h.
template <int estimator> __device__ __forceinline__ float by_sigma_of(float second, float sigma, float eps) {
  return times(second, estimator == kLocal ? sigma : eps);
}

// Calls launch<estimator, kBatch>().
template <class Launch> cudaError_t with_estimator_and_batch(int estimator, int64_t batch, Launch launch) {
  auto with_batch = [&]<int of>() {
    return padded_batch(batch) == 1   ? launch.template operator()<of, 1>()
           : padded_batch(batch) == 4 ? launch.template operator()<of, 4>()
                                      : launch.template operator()<of, int(kEstimatedBatch)>();
  };
  return estimator == kLocal ? with_batch.template operator()<kLocal>() : with_batch.template operator()<kFlipout>();
}

}  // namespace
}  // namespace bnn_fast
