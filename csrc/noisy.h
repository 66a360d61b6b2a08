// The linear layer with factorised noise for any device (Fortunato et al., "Noisy networks for exploration", 2018): a variational one whose
// weights of a draw have eps[o, i] = f(e_o) f(e_i), the biases f(e_o), with f(e) = sign(e) sqrt |e| of as many normals as there are inputs
// (of the weight's stream) and outputs (of the bias's). All else is layer.h's.
//
// A Device brings beside what layer.h asks for:
//   static void factors(memory, normals)   f of the normals of a posterior of one row, behind kBeforeFactors elements of memory
#pragma once

#include "layer.h"

namespace bnn_fast {

constexpr int64_t kBeforeFactors = 4;

template <class Device> struct NoisyArguments : LinearArguments {
  Tensor of_inputs, of_outputs;

  NoisyArguments(const Lists& lists, const Tensor& key, const Options& options) : LinearArguments(lists, key, options) {
    STD_TORCH_CHECK(samples == 1 && divergence == kNone, "n_samples is ", samples, " and kl is ", divergence, ", expected 1 and 0 (none)");
    STD_TORCH_CHECK(options.scale == kIdentity, "scale is ", options.scale, ", expected 4 (identity)");
    Posterior& w = weight.view;
    w.column_factors = factors(of_inputs, w.columns, w.stream, w.column_offset);
    w.row_factors = factors(of_outputs, w.rows, w.stream + 1, w.row_offset);
    if (bias) bias->view.column_factors = w.row_factors;
  }

 private:
  const void* factors(Tensor& memory, int64_t n, uint32_t stream, int64_t first) const {
    ScalarType type = compute_type(weight.mu.scalar_type());
    memory = empty_of(weight.mu, {kBeforeFactors + n + Posterior::kFactorTail}, type);
    Posterior normals{1, n, type_of_tensor(memory, "factors"), nullptr, nullptr, kIdentity, {0, 1, nullptr, nullptr}, weight.view.key,
                      stream, 0, first};
    Device::factors(memory, normals);
    return static_cast<const char*>(memory.const_data_ptr()) + kBeforeFactors * size_of(normals.type);
  }
};

template <class Device>
std::tuple<Tensor, Tensor> noisy_linear(const Tensor& x, const Tensors& posterior, const Tensor& key, const Tensors& prior,
                                        const Numbers& numbers, const Integers& options) {
  return layer_forward<Device>(NoisyArguments<Device>(Lists(posterior, prior, numbers, true), key, options_of(options)), x);
}

template <class Device>
Tensors noisy_linear_backward(const OptionalTensors& given, const OptionalTensor& x, const Tensors& posterior, const Tensor& key,
                              const Tensors& prior, const Numbers& numbers, const Integers& options, bool need_grad_x) {
  NoisyArguments<Device> a(Lists(posterior, prior, numbers, true), key, options_of(options));
  return layer_backward<Device>(a, given, x, need_grad_x);
}

}  // namespace bnn_fast
