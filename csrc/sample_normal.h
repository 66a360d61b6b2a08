// The operators sample_normal and kl_normal, forward and backward, on any device: checks, results, and what is computed.
// A Device is made for one call, with a tensor of that call and the operator's name, and has
//
//   empty(like, shape, dtype)                                       a result to be filled
//   sample(posterior, divergence, samples, weight, type, like)      draws weights (none if weight is null); their KL, the mean
//                                                                   over samples if it is sampled, as a tensor like `like`
//   backward(SampleBackward), kl_elements(KlElements)               run these kernels
#pragma once

#include "arguments.h"

namespace bnn_fast {

template <class Device> struct SampleNormal {
  static std::tuple<Tensor, Tensor> forward(const Tensors& posterior, const Tensor& key, const Tensors& prior,
                                            const Numbers& numbers, const Integers& options) {
    Options o = options_of(options);
    Lists lists(posterior, prior, numbers, false);
    const Tensor& mu = posterior[0];
    Device device(mu, "_sample_normal");
    PosteriorTensors p = lists.pair(0, key, o);
    Tensor weight = device.empty(mu, with_samples(mu, o.samples), mu.scalar_type());
    Tensor sum = device.sample(p.view, o.divergence, o.samples, weight.mutable_data_ptr(), p.view.type, mu);
    return {weight, sum};
  }

  static Tensors backward(const OptionalTensors& grads, const Tensors& posterior, const Tensor& key, const Tensors& prior,
                          const Numbers& numbers, const Integers& options) {
    Options o = options_of(options);
    Lists lists(posterior, prior, numbers, false);
    check_gradients(grads, {"grad_weight", "grad_kl"});
    const Tensor& mu = posterior[0];
    Device device(mu, "_sample_normal_backward");
    PosteriorTensors p = lists.pair(0, key, o);
    if (grads[0]) check_gradient(*grads[0], "grad_weight", with_samples(mu, o.samples), mu.scalar_type(), mu);
    if (grads[1]) check_gradient(*grads[1], "grad_kl", {}, compute_type(mu.scalar_type()), mu);
    OptionalTensor grad_weight = dense(grads[0]);
    return gradients(device, mu,
                     SampleBackward{p.view, static_cast<int>(o.divergence), o.samples, data_of(grad_weight), p.view.type,
                                    make_kl_gradient(grads[1], false), nullptr, nullptr});
  }

  static Tensor divergence(const Tensors& posterior, const Tensors& prior, const Numbers& numbers,
                           const Integers& options) {
    Lists lists(posterior, prior, numbers, false);
    KlOptions o = kl_options_of(options);
    const Tensor& mu = posterior[0];
    Device device(mu, "_kl_normal");
    PosteriorTensors p = lists.pair(0, std::nullopt, {o.scale, o.places});
    if (o.reduce) return device.sample(p.view, kAnalytic, 0, nullptr, p.view.type, mu);
    Tensor kl = device.empty(mu, shape_of(mu), mu.scalar_type());
    device.kl_elements(KlElements{p.view, kl.mutable_data_ptr()});
    return kl;
  }

  static Tensors divergence_backward(const OptionalTensors& grads, const Tensors& posterior, const Tensors& prior,
                                     const Numbers& numbers, const Integers& options) {
    Lists lists(posterior, prior, numbers, false);
    KlOptions o = kl_options_of(options);
    check_gradients(grads, {"grad_kl"});
    STD_TORCH_CHECK(grads[0], "grad_kl is absent, expected a tensor");
    const Tensor& mu = posterior[0];
    Device device(mu, "_kl_normal_backward");
    PosteriorTensors p = lists.pair(0, std::nullopt, {o.scale, o.places});
    check_gradient(*grads[0], "grad_kl", o.reduce ? Shape{} : shape_of(mu),
                   o.reduce ? compute_type(mu.scalar_type()) : mu.scalar_type(), mu);
    OptionalTensor grad = dense(grads[0]);
    return gradients(device, mu,
                     SampleBackward{p.view, kAnalytic, 0, nullptr, p.view.type, make_kl_gradient(grad, !o.reduce), nullptr,
                                    nullptr});
  }

 private:
  static Tensors gradients(Device& device, const Tensor& mu, SampleBackward problem) {
    Tensor grad_mu = device.empty(mu, shape_of(mu), mu.scalar_type());
    Tensor grad_rho = device.empty(mu, shape_of(mu), mu.scalar_type());
    problem.grad_mu = grad_mu.mutable_data_ptr();
    problem.grad_rho = grad_rho.mutable_data_ptr();
    device.backward(problem);
    return {grad_mu, grad_rho};
  }
};

}  // namespace bnn_fast
