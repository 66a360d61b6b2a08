// The operators of the variational linear layer by the estimators "local" and "flipout" for any device: arguments and their checks.
// Formulas: cpu/estimators.h.
//
// A Layer brings what differs (cpu/estimated.h, cuda/bind_estimated_linear.cpp):
//   Layer(a, x, estimator, may_share)        of one call; may_share: whether samples of "local" that have the same input may have their
//                                            mean and variance in common
//   forward()                                y, the KL, and what goes to the backward
//   void backward(grad_y, grad_kl, need_x, kept, grads)
//   static Tensor empty_like(t)              memory for a gradient
//   static void sample_backward(a, problem)  the gradients of a KL that comes without y's
#pragma once

#include "layer.h"

namespace bnn_fast {

template <class Layer>
std::tuple<Tensor, Tensor, Tensor> estimated_linear(const Tensor& x, const Tensors& posterior, const Tensor& key, const Tensors& prior,
                                                    const Numbers& numbers, const Integers& options) {
  Options o = options_of(options, true);
  LinearArguments a(Lists(posterior, prior, numbers, true), key, o);
  return Layer(a, x, o.estimator, true).forward();
}

template <class Layer>
Tensors estimated_linear_backward(const OptionalTensors& given, const OptionalTensor& x, const Tensors& posterior, const Tensor& key,
                                  const Tensors& prior, const Numbers& numbers, const Integers& options, bool need_grad_x,
                                  const OptionalTensor& kept) {
  Options o = options_of(options, true);
  LinearArguments a(Lists(posterior, prior, numbers, true), key, o);
  check_gradients(given, {"grad_y", "grad_kl"});
  const OptionalTensor &grad_y = given[0], &grad_kl = given[1];
  STD_TORCH_CHECK(x || !grad_y, "x is absent, expected it with grad_y");
  const Tensor& weight_mu = posterior[0];
  if (grad_kl) check_gradient(*grad_kl, "grad_kl", {}, compute_type(weight_mu.scalar_type()), weight_mu);
  KlGradient k = make_kl_gradient(grad_kl, false);
  LinearGradients grads{empty_of(weight_mu, {0}, weight_mu.scalar_type()), Layer::empty_like(weight_mu), Layer::empty_like(weight_mu),
                        {}, {}};
  if (a.bias) grads.bias_mu = Layer::empty_like(posterior[2]), grads.bias_rho = Layer::empty_like(posterior[2]);
  if (grad_y) {
    Layer layer(a, *x, o.estimator, !need_grad_x);
    Shape shape = a.output_shape(*x);
    check_gradient(*grad_y, "grad_y", shape, x->scalar_type(), weight_mu);
    STD_TORCH_CHECK(o.estimator != kLocal || kept, "kept is absent, expected what the forward gave");
    OptionalTensor of_forward;
    if (o.estimator == kLocal) {
      check_gradient(*kept, "kept", shape, compute_type(x->scalar_type()), weight_mu);
      of_forward = dense(*kept);
    }
    layer.backward(*grad_y, k, need_grad_x, of_forward, grads);
  } else {
    auto of_kl = [&](const PosteriorTensors& p, Tensor& grad_mu, Tensor& grad_rho) {
      Layer::sample_backward(a, SampleBackward{p.view, static_cast<int>(a.divergence), a.samples, nullptr, p.view.type, k,
                                               grad_mu.mutable_data_ptr(), grad_rho.mutable_data_ptr()});
    };
    of_kl(a.weight, grads.weight_mu, grads.weight_rho);
    if (a.bias) of_kl(*a.bias, *grads.bias_mu, *grads.bias_rho);
  }
  if (!a.bias) return {grads.x, grads.weight_mu, grads.weight_rho};
  return {grads.x, grads.weight_mu, grads.weight_rho, *grads.bias_mu, *grads.bias_rho};
}

}  // namespace bnn_fast
