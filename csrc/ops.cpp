// The operators' schemas, in one place. Implementations: cpu/*.cpp and cuda/*.cpp; fakes: bnn_fast/operators/raw.py; gradients:
// bnn_fast/operators/autograd.py.
//
//   scale  0 softplus, 1 exp, 2 sqrt_exp (posterior.h)        kl  0 none, 1 analytic, 2 sampled (divergence.h)
//   key    int64 [2] = (seed, first sample), on the tensors' device
//   prior  N(loc, sd^2): tensors of mu's shape where given, the numbers otherwise
#include "tensors.h"

BNN_FAST_DEFINE(BNN_FAST_LIBRARY, m) {
  m.def(
      "_sample_normal(Tensor mu, Tensor rho, Tensor key, Tensor? prior_loc, Tensor? prior_scale, float loc, float prior_sd, "
      "int scale, int kl, int n_samples, int stream, int row_offset, int column_offset) -> (Tensor weight, Tensor kl_sum)");
  m.def(
      "_sample_normal_backward(Tensor? grad_weight, Tensor? grad_kl, Tensor mu, Tensor rho, Tensor key, Tensor? prior_loc, "
      "Tensor? prior_scale, float loc, float prior_sd, int scale, int kl, int n_samples, int stream, int row_offset, "
      "int column_offset) -> (Tensor grad_mu, Tensor grad_rho)");
  m.def(
      "_kl_normal(Tensor mu, Tensor rho, Tensor? prior_loc, Tensor? prior_scale, float loc, float prior_sd, int scale, "
      "bool reduce) -> Tensor");
  m.def(
      "_kl_normal_backward(Tensor grad, Tensor mu, Tensor rho, Tensor? prior_loc, Tensor? prior_scale, float loc, "
      "float prior_sd, int scale, bool reduce) -> (Tensor grad_mu, Tensor grad_rho)");
  m.def(
      "_variational_linear(Tensor x, Tensor weight_mu, Tensor weight_rho, Tensor? bias_mu, Tensor? bias_rho, Tensor key, "
      "Tensor? weight_loc, Tensor? weight_sd, Tensor? bias_loc, Tensor? bias_sd, float loc, float sd, float bias_loc_number, "
      "float bias_sd_number, int scale, int kl, int n_samples, int row_offset, int column_offset) -> (Tensor y, Tensor kl_sum)");
  m.def(
      "_variational_linear_backward(Tensor? grad_y, Tensor? grad_kl, Tensor? x, Tensor weight_mu, Tensor weight_rho, "
      "Tensor? bias_mu, Tensor? bias_rho, Tensor key, Tensor? weight_loc, Tensor? weight_sd, Tensor? bias_loc, Tensor? bias_sd, "
      "float loc, float sd, float bias_loc_number, float bias_sd_number, int scale, int kl, int n_samples, int row_offset, "
      "int column_offset, bool need_grad_x) -> (Tensor grad_x, Tensor grad_weight_mu, Tensor grad_weight_rho, "
      "Tensor grad_bias_mu, Tensor grad_bias_rho)");
  // 0 small (the CPU's narrow.h, CUDA's small_linear*), 1 fused, 2 drawn (layer.h)
  m.def("_linear_regime(Tensor x, Tensor weight_mu, int n_samples) -> int");
}
