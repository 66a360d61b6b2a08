// The operators sample_normal and kl_normal, forward and backward, on any device: checks, results, and what is computed.
// A Device is made for one call, with a tensor of that call and the operator's name, and has
//
//   empty(like, shape, dtype)                                       a result to be filled
//   sample(posterior, divergence, samples, weight, type, like)      draws weights (none if weight is null); their KL, the mean
//                                                                   over samples if it is sampled, as a tensor like `like`
//   backward(SampleBackward), kl_elements(KlElements)               run these kernels
#pragma once

#include "divergence.h"
#include "tensors.h"

namespace bnn_fast {

template <class Device> struct SampleNormal {
  static std::tuple<Tensor, Tensor> forward(const Tensor mu, const Tensor rho, const Tensor key, OptionalTensor prior_loc,
                                            OptionalTensor prior_scale, double loc, double prior_sd, int64_t scale, int64_t kl,
                                            int64_t n_samples, int64_t stream, int64_t row_offset, int64_t column_offset) {
    check_divergence(kl);
    check_samples(n_samples);
    Device device(mu, "_sample_normal");
    PosteriorTensors p =
        make_posterior(mu, rho, key, {prior_loc, prior_scale, loc, prior_sd}, scale, stream, row_offset, column_offset);
    Tensor weight = device.empty(mu, with_samples(mu, n_samples), mu.scalar_type());
    Tensor sum = device.sample(p.view, kl, n_samples, weight.mutable_data_ptr(), p.view.type, mu);
    return {weight, sum};
  }

  static std::tuple<Tensor, Tensor> backward(OptionalTensor grad_weight, OptionalTensor grad_kl, const Tensor mu,
                                             const Tensor rho, const Tensor key, OptionalTensor prior_loc,
                                             OptionalTensor prior_scale, double loc, double prior_sd, int64_t scale, int64_t kl,
                                             int64_t n_samples, int64_t stream, int64_t row_offset, int64_t column_offset) {
    check_divergence(kl);
    check_samples(n_samples);
    Device device(mu, "_sample_normal_backward");
    PosteriorTensors p =
        make_posterior(mu, rho, key, {prior_loc, prior_scale, loc, prior_sd}, scale, stream, row_offset, column_offset);
    if (grad_weight) {
      check_gradient(*grad_weight, "grad_weight", with_samples(mu, n_samples), mu.scalar_type(), mu);
      grad_weight = dense(*grad_weight);
    }
    if (grad_kl) check_gradient(*grad_kl, "grad_kl", {}, compute_type(mu.scalar_type()), mu);
    return gradients(device, mu,
                     SampleBackward{p.view, static_cast<int>(kl), n_samples,
                                    grad_weight ? grad_weight->const_data_ptr() : nullptr, p.view.type,
                                    make_kl_gradient(grad_kl, false), nullptr, nullptr});
  }

  static Tensor divergence(const Tensor mu, const Tensor rho, OptionalTensor prior_loc, OptionalTensor prior_scale, double loc,
                           double prior_sd, int64_t scale, bool reduce) {
    Device device(mu, "_kl_normal");
    PosteriorTensors p = make_posterior(mu, rho, std::nullopt, {prior_loc, prior_scale, loc, prior_sd}, scale, 0, 0, 0);
    if (reduce) return device.sample(p.view, kAnalytic, 0, nullptr, p.view.type, mu);
    Tensor kl = device.empty(mu, shape_of(mu), mu.scalar_type());
    device.kl_elements(KlElements{p.view, kl.mutable_data_ptr()});
    return kl;
  }

  static std::tuple<Tensor, Tensor> divergence_backward(const Tensor grad, const Tensor mu, const Tensor rho,
                                                        OptionalTensor prior_loc, OptionalTensor prior_scale, double loc,
                                                        double prior_sd, int64_t scale, bool reduce) {
    Device device(mu, "_kl_normal_backward");
    PosteriorTensors p = make_posterior(mu, rho, std::nullopt, {prior_loc, prior_scale, loc, prior_sd}, scale, 0, 0, 0);
    check_gradient(grad, "grad", reduce ? Shape{} : shape_of(mu),
                   reduce ? compute_type(mu.scalar_type()) : mu.scalar_type(), mu);
    Tensor plain = dense(grad);
    return gradients(device, mu,
                     SampleBackward{p.view, kAnalytic, 0, nullptr, p.view.type, make_kl_gradient(plain, !reduce), nullptr,
                                    nullptr});
  }

 private:
  static std::tuple<Tensor, Tensor> gradients(Device& device, const Tensor& mu, SampleBackward problem) {
    Tensor grad_mu = device.empty(mu, shape_of(mu), mu.scalar_type());
    Tensor grad_rho = device.empty(mu, shape_of(mu), mu.scalar_type());
    problem.grad_mu = grad_mu.mutable_data_ptr();
    problem.grad_rho = grad_rho.mutable_data_ptr();
    device.backward(problem);
    return {grad_mu, grad_rho};
  }
};

}  // namespace bnn_fast
