// sample_normal on CUDA tensors. Kernel: sample_normal.cu.
#include "../divergence.h"
#include "../tensors.h"
#include "sample_normal.h"
#include "stream.h"

namespace bnn_fast {
namespace {

std::tuple<Tensor, Tensor> sample_normal(const Tensor mu, const Tensor rho, const Tensor key, OptionalTensor prior_loc,
                                         OptionalTensor prior_scale, double loc, double prior_sd, int64_t scale, int64_t kl,
                                         int64_t n_samples, int64_t stream, int64_t row_offset, int64_t column_offset) {
  check_divergence(kl);
  check_samples(n_samples);
  STD_TORCH_CHECK(mu.scalar_type() == ScalarType::Float, "mu is not float32, the one type that has a CUDA kernel yet");
  OnDevice device(mu);
  PosteriorTensors p =
      make_posterior(mu, rho, key, {prior_loc, prior_scale, loc, prior_sd}, scale, stream, row_offset, column_offset);
  Shape shape = shape_of(mu);
  shape.insert(shape.begin(), n_samples);
  Tensor weight = empty_of(mu, shape, mu.scalar_type()), sum = empty_of(mu, {}, mu.scalar_type());
  SampleForward problem{p.view, static_cast<int>(kl), n_samples, weight.mutable_data_ptr(), p.view.type, nullptr};
  Tensor parts = empty_of(mu, {kl == kNone ? 0 : bnn_fast_cuda_sample_normal_blocks(&problem)}, ScalarType::Double);
  if (kl != kNone) problem.kl = static_cast<double*>(parts.mutable_data_ptr());
  cudaError_t error =
      bnn_fast_cuda_sample_normal(&problem, static_cast<float*>(sum.mutable_data_ptr()), device.stream());
  STD_TORCH_CHECK(error == cudaSuccess, "bnn_fast::_sample_normal: ", cudaGetErrorString(error));
  return {weight, sum};
}

}  // namespace
}  // namespace bnn_fast

BNN_FAST_IMPLEMENT(BNN_FAST_LIBRARY, BNN_FAST_CUDA_KEY, m) {
  m.impl("_sample_normal", TORCH_BOX(&bnn_fast::sample_normal));
}
