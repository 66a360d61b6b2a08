// The operators of the variational linear layer by the estimators "local" and "flipout" on the CPU.
#include "estimated.h"

namespace bnn_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensors& posterior, const Tensor& key, const Tensors& prior,
                                           const Numbers& numbers, const Integers& options) {
  Options o = options_of(options, true);
  LinearArguments a(Lists(posterior, prior, numbers, true), key, o);
  return Estimated(a, x, o.estimator, true).forward();
}

Tensors backward(const OptionalTensors& given, const OptionalTensor& x, const Tensors& posterior, const Tensor& key,
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
  auto like = [&](const Tensor& t) { return empty_large(t, shape_of(t), t.scalar_type()); };
  LinearGradients grads{empty_of(weight_mu, {0}, weight_mu.scalar_type()), like(weight_mu), like(weight_mu), {}, {}};
  if (a.bias) grads.bias_mu = like(posterior[2]), grads.bias_rho = like(posterior[2]);
  if (grad_y) {
    Estimated layer(a, *x, o.estimator, !need_grad_x);
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
      run_spans(cpu_kernels().sample_backward, SampleBackward{p.view, static_cast<int>(a.divergence), a.samples, nullptr, p.view.type, k,
                                                              grad_mu.mutable_data_ptr(), grad_rho.mutable_data_ptr()});
    };
    of_kl(a.weight, grads.weight_mu, grads.weight_rho);
    if (a.bias) of_kl(*a.bias, *grads.bias_mu, *grads.bias_rho);
  }
  if (!a.bias) return {grads.x, grads.weight_mu, grads.weight_rho};
  return {grads.x, grads.weight_mu, grads.weight_rho, *grads.bias_mu, *grads.bias_rho};
}

}  // namespace
}  // namespace bnn_fast

STABLE_TORCH_LIBRARY_IMPL(bnn_fast, CPU, m) {
  m.impl("_estimated_linear", TORCH_BOX(&bnn_fast::forward));
  m.impl("_estimated_linear_backward", TORCH_BOX(&bnn_fast::backward));
}
