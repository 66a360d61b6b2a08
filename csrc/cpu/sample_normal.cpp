// sample_normal and kl_normal on the CPU, forward and backward. Kernels: sample.h.
#include "launch.h"

namespace bnn_fast {
namespace {

std::tuple<Tensor, Tensor> sample_normal(const Tensor mu, const Tensor rho, const Tensor key, OptionalTensor prior_loc,
                                         OptionalTensor prior_scale, double loc, double prior_sd, int64_t scale, int64_t kl,
                                         int64_t n_samples, int64_t stream, int64_t row_offset, int64_t column_offset) {
  check_divergence(kl);
  check_samples(n_samples);
  PosteriorTensors p =
      make_posterior(mu, rho, key, {prior_loc, prior_scale, loc, prior_sd}, scale, stream, row_offset, column_offset);
  Shape shape = shape_of(mu);
  shape.insert(shape.begin(), n_samples);
  Tensor weight = empty_large(mu, shape, mu.scalar_type());
  double sum = sample(p.view, kl, n_samples, weight.mutable_data_ptr(), p.view.type);
  return {weight, scalar_tensor(sum, mu)};
}

std::tuple<Tensor, Tensor> sample_normal_backward(OptionalTensor grad_weight, OptionalTensor grad_kl, const Tensor mu,
                                                  const Tensor rho, const Tensor key, OptionalTensor prior_loc,
                                                  OptionalTensor prior_scale, double loc, double prior_sd, int64_t scale,
                                                  int64_t kl, int64_t n_samples, int64_t stream, int64_t row_offset,
                                                  int64_t column_offset) {
  check_divergence(kl);
  check_samples(n_samples);
  PosteriorTensors p =
      make_posterior(mu, rho, key, {prior_loc, prior_scale, loc, prior_sd}, scale, stream, row_offset, column_offset);
  if (grad_weight) {
    Shape shape = shape_of(mu);
    shape.insert(shape.begin(), n_samples);
    STD_TORCH_CHECK(shape_of(*grad_weight) == shape && grad_weight->scalar_type() == mu.scalar_type(), "grad_weight has shape ",
                    describe(shape_of(*grad_weight)), ", expected ", describe(shape), " and mu's dtype");
    grad_weight = dense(*grad_weight);
  }
  Tensor grad_mu = empty_large(mu, shape_of(mu), mu.scalar_type()), grad_rho = empty_large(mu, shape_of(mu), mu.scalar_type());
  run_spans(cpu_kernels().sample_backward,
            SampleBackward{p.view, static_cast<int>(kl), n_samples, grad_weight ? grad_weight->const_data_ptr() : nullptr,
                           p.view.type, make_kl_gradient(grad_kl, false), grad_mu.mutable_data_ptr(), grad_rho.mutable_data_ptr()});
  return {grad_mu, grad_rho};
}

Tensor kl_normal(const Tensor mu, const Tensor rho, OptionalTensor prior_loc, OptionalTensor prior_scale, double loc,
                 double prior_sd, int64_t scale, bool reduce) {
  PosteriorTensors p = make_posterior(mu, rho, std::nullopt, {prior_loc, prior_scale, loc, prior_sd}, scale, 0, 0, 0);
  if (reduce) return scalar_tensor(sample(p.view, kAnalytic, 0, nullptr, p.view.type), mu);
  Tensor kl = empty_large(mu, shape_of(mu), mu.scalar_type());
  run_spans(cpu_kernels().kl_elements, KlElements{p.view, kl.mutable_data_ptr()});
  return kl;
}

std::tuple<Tensor, Tensor> kl_normal_backward(const Tensor grad, const Tensor mu, const Tensor rho, OptionalTensor prior_loc,
                                              OptionalTensor prior_scale, double loc, double prior_sd, int64_t scale, bool reduce) {
  PosteriorTensors p = make_posterior(mu, rho, std::nullopt, {prior_loc, prior_scale, loc, prior_sd}, scale, 0, 0, 0);
  Shape expected = reduce ? Shape{} : shape_of(mu);
  STD_TORCH_CHECK(shape_of(grad) == expected, "grad has shape ", describe(shape_of(grad)), ", expected ", describe(expected));
  Tensor plain = dense(grad);
  Tensor grad_mu = empty_large(mu, shape_of(mu), mu.scalar_type()), grad_rho = empty_large(mu, shape_of(mu), mu.scalar_type());
  run_spans(cpu_kernels().sample_backward,
            SampleBackward{p.view, kAnalytic, 0, nullptr, p.view.type, make_kl_gradient(plain, !reduce),
                           grad_mu.mutable_data_ptr(), grad_rho.mutable_data_ptr()});
  return {grad_mu, grad_rho};
}

}  // namespace
}  // namespace bnn_fast

STABLE_TORCH_LIBRARY_IMPL(bnn_fast, CPU, m) {
  m.impl("_sample_normal", TORCH_BOX(&bnn_fast::sample_normal));
  m.impl("_sample_normal_backward", TORCH_BOX(&bnn_fast::sample_normal_backward));
  m.impl("_kl_normal", TORCH_BOX(&bnn_fast::kl_normal));
  m.impl("_kl_normal_backward", TORCH_BOX(&bnn_fast::kl_normal_backward));
}
