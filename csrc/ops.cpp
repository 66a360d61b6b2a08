// The operators' schemas, in one place. Implementations: cpu/*.cpp and cuda/*.cpp; fakes: bnn_fast/operators/raw.py; gradients:
// bnn_fast/operators/autograd.py. What belongs together travels in one list, packed by bnn_fast/operators/arguments.py and
// unpacked by arguments.h:
//
//   posterior  mu, rho; of a layer weight_mu, weight_rho, and bias_mu, bias_rho where it has a bias
//   key        int64 [2] = (seed, first sample), on the tensors' device; or [3], the third the row of a whole batch that the
//              input begins at, which the noise of "local" and "flipout" is counted by and nothing else reads
//   numbers    for each mu and rho loc and scale of the prior N(loc, scale^2)
//   prior      those of loc and scale that are tensors, of mu's shape, instead
//   options    scale   0 softplus, 1 exp, 2 sqrt_exp, 3 square, 4 identity (posterior.h)
//              places  bit i is set where one of prior's tensors, the next, takes the place of numbers[i]
//              of what draws
//                kl   0 none, 1 analytic, 2 sampled (divergence.h)
//                n_samples
//                stream, row_offset, column_offset of the noise; a layer's bias has the stream behind its weight's
//              of an estimated layer, at the end
//                estimator  1 local, 2 flipout (problem.h)
//              of rows that are looked up, at the end
//                gradient  0 dense, 1 sparse, 2 dense and divided by how often the call looks the row up
//              of a chain, in the place of all behind n_samples
//                shared  1 where all samples have the same x
//                of every layer  1 where it is drawn, 2 where it has a bias, in one number; its activation (activation.h)
//              of the KL without a draw
//                reduce  1 for the sum, 0 for every element
//   grads      of the results in their order, None for one that nobody uses
//
// A backward gives the gradients of x, if there is one, and of each tensor of the posterior.
#include "tensors.h"

BNN_FAST_DEFINE(BNN_FAST_LIBRARY, m) {
  m.def(
      "_sample_normal(Tensor[] posterior, Tensor key, Tensor[] prior, float[] numbers, int[] options) -> "
      "(Tensor weight, Tensor kl_sum)");
  m.def(
      "_sample_normal_backward(Tensor?[] grads, Tensor[] posterior, Tensor key, Tensor[] prior, float[] numbers, "
      "int[] options) -> Tensor[]");
  m.def("_kl_normal(Tensor[] posterior, Tensor[] prior, float[] numbers, int[] options) -> Tensor");
  m.def(
      "_kl_normal_backward(Tensor?[] grads, Tensor[] posterior, Tensor[] prior, float[] numbers, int[] options) -> Tensor[]");
  // Rows of a drawn table mu, rho [table's rows, columns] (rows.h). look_up: int64 rows [T], of the n_samples draws in equal parts,
  // or [2, T], each row and its draw, below 0 for one that no KL counts; and where there is a KL maybe counts, int64 [table's rows].
  // numbers has a third: the KL of a row counts it, divided by the row's counts, every time. y is [T, columns]; kl_sum is
  // empty without a KL. `kept` is the noise [T, columns], or nothing where it is much and on CUDA.
  m.def(
      "_sample_rows(Tensor[] posterior, Tensor[] look_up, Tensor key, Tensor[] prior, float[] numbers, int[] options) -> "
      "(Tensor y, Tensor kl_sum, Tensor kept)");
  m.def(
      "_sample_rows_backward(Tensor?[] grads, Tensor[] posterior, Tensor[] look_up, Tensor key, Tensor[] prior, float[] numbers, "
      "int[] options, Tensor? kept) -> Tensor[]");
  m.def(
      "_variational_linear(Tensor x, Tensor[] posterior, Tensor key, Tensor[] prior, float[] numbers, int[] options) -> "
      "(Tensor y, Tensor kl_sum)");
  // x may be absent where y has no gradient; its own gradient is empty where it is not needed.
  m.def(
      "_variational_linear_backward(Tensor?[] grads, Tensor? x, Tensor[] posterior, Tensor key, Tensor[] prior, "
      "float[] numbers, int[] options, bool need_grad_x) -> Tensor[]");
  m.def("_sum_values(Tensor[] values) -> Tensor");  // numbers, each a tensor of its own
  // The same without KL and samples, with the noise of a noisy layer (noisy.h).
  m.def(
      "_noisy_linear(Tensor x, Tensor[] posterior, Tensor key, Tensor[] prior, float[] numbers, int[] options) -> "
      "(Tensor y, Tensor kl_sum)");
  m.def(
      "_noisy_linear_backward(Tensor?[] grads, Tensor? x, Tensor[] posterior, Tensor key, Tensor[] prior, "
      "float[] numbers, int[] options, bool need_grad_x) -> Tensor[]");
  // The layer by an estimator that draws less than weights (cpu/estimators.h). `kept` goes from forward to backward: eps / sqrt(v)
  // of "local", [x's rows, out] in the type computed in, and nothing of "flipout".
  m.def(
      "_estimated_linear(Tensor x, Tensor[] posterior, Tensor key, Tensor[] prior, float[] numbers, int[] options) -> "
      "(Tensor y, Tensor kl_sum, Tensor kept)");
  m.def(
      "_estimated_linear_backward(Tensor?[] grads, Tensor? x, Tensor[] posterior, Tensor key, Tensor[] prior, "
      "float[] numbers, int[] options, bool need_grad_x, Tensor? kept) -> Tensor[]");
  // A chain of linear layers with activations (cpu/chain.h, cuda/chain_*.cu). `parameters` are each layer's, mu and rho of one
  // that is drawn; keys are of those, and numbers are theirs and then two of every layer's activation. `kept` are the drawn weights,
  // or nothing where they are many.
  m.def(
      "_variational_chain(Tensor x, Tensor[] parameters, Tensor[] keys, Tensor[] prior, float[] numbers, int[] options) -> "
      "(Tensor y, Tensor kl_sum, Tensor kept)");
  m.def(
      "_variational_chain_backward(Tensor?[] grads, Tensor? x, Tensor[] parameters, Tensor[] keys, Tensor[] prior, "
      "float[] numbers, int[] options, bool need_grad_x, Tensor? kept) -> Tensor[]");
  // 0 small (the CPU's narrow.h, CUDA's small_linear*), 1 fused, 2 drawn (layer.h)
  m.def("_linear_regime(Tensor x, Tensor weight_mu, int n_samples) -> int");
}
