// The variational linear layer, and the noisy one, on CUDA tensors: the choice among its regimes, workspaces, launches.
#include "../noisy.h"
#include "linear.h"
#include "sample_normal.h"
#include "stream.h"
#include "sum_values.h"

namespace bnn_fast {
namespace {

class Cuda {
 public:
  Regime regime = Regime::kDrawn;

  explicit Cuda(const LinearArguments& a)
      : device(a.weight.mu), a(a), value(empty_of(a.weight.mu, {}, compute_type(a.weight.mu.scalar_type()))) {}

  static constexpr bool kKeepsNoise = false;

  void sample(const Posterior& p, int64_t divergence, int64_t samples, void* weight, Type type, void* = nullptr) {
    SampleForward problem{p, static_cast<int>(divergence), samples, weight, type, nullptr};
    if (divergence != kNone) problem.kl = parts_for(problem);
    check_cuda(bnn_fast_cuda_sample_forward(&problem, device.stream()), "_variational_linear");
  }

  void sample_backward(const SampleBackward& problem) {
    check_cuda(bnn_fast_cuda_sample_backward(&problem, device.stream()), "_variational_linear_backward");
  }

  Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) { return empty_of(like, shape, dtype); }

  static void factors(const Tensor& memory, const Posterior& normals) {
    void* to = static_cast<char*>(memory.mutable_data_ptr()) + kBeforeFactors * size_of(normals.type);
    check_cuda(bnn_fast_cuda_factors(&normals, to, OnDevice(memory).stream()), "_noisy_linear");
  }

  // Small layers are bound by launches: one kernel each way. Fused saves passes over the weights, and one of the three draws that a
  // step in the drawn regime makes; but its products are no match for the GEMM's, and it pays while a batch is small. The bounds
  // are what the kernels hold in registers and shared memory; by count of bytes and instructions (a float32 weight takes 3
  // multiply-adds a batch row, beside some 250 instructions for both draws) fused is ahead up to there. Not yet measured.
  static Regime choose(const Posterior& weight, ScalarType x_type, int64_t samples, int64_t batch) {
    if (weight.rows == 0 || weight.columns == 0 || batch == 0) return Regime::kDrawn;
    if (weight.rows <= kSmallSide && weight.columns <= kSmallSide) return Regime::kSmall;
    if (x_type == ScalarType::Double || samples > kFusedSamples) return Regime::kDrawn;
    int64_t most = x_type == ScalarType::Float || samples > 1 ? kFusedBatch : kFusedBatchHalf;
    return batch <= most ? Regime::kFused : Regime::kDrawn;
  }

  Tensor fused_forward(const LinearArguments& a, const Tensor& x, int64_t batch) {
    Tensor inputs = dense(x), y = empty_of(x, a.output_shape(x), x.scalar_type());
    LayerForward problem{a.weight.view,        bias_view(),
                         static_cast<int>(a.divergence), a.samples,
                         batch,                inputs.const_data_ptr(),
                         type_of_tensor(x, "x"), y.mutable_data_ptr(),
                         value.mutable_data_ptr(), nullptr};
    bool small = regime == Regime::kSmall;
    Tensor workspace = workspace_of(small ? bnn_fast_cuda_small_forward_workspace(&problem)
                                          : bnn_fast_cuda_linear_forward_workspace(&problem));
    problem.workspace = workspace.mutable_data_ptr();
    auto launch = small ? bnn_fast_cuda_small_forward : bnn_fast_cuda_linear_forward;
    check_cuda(launch(&problem, device.stream()), "_variational_linear");
    return y;
  }

  void fused_backward(const LinearArguments& a, const Tensor& x, const Tensor& grad_y, const KlGradient& grad_kl, bool need_x,
                      int64_t batch, LinearGradients& grads) {
    Tensor inputs = dense(x), outputs = dense(grad_y);
    if (need_x) grads.x = empty_of(x, shape_of(x), x.scalar_type());
    LayerBackward problem{a.weight.view,
                          bias_view(),
                          static_cast<int>(a.divergence),
                          a.samples,
                          batch,
                          inputs.const_data_ptr(),
                          outputs.const_data_ptr(),
                          type_of_tensor(x, "x"),
                          grad_kl,
                          need_x ? grads.x.mutable_data_ptr() : nullptr,
                          grads.weight_mu.mutable_data_ptr(),
                          grads.weight_rho.mutable_data_ptr(),
                          a.bias ? grads.bias_mu->mutable_data_ptr() : nullptr,
                          a.bias ? grads.bias_rho->mutable_data_ptr() : nullptr,
                          nullptr};
    bool small = regime == Regime::kSmall;
    Tensor workspace = workspace_of(small ? bnn_fast_cuda_small_backward_workspace(&problem)
                                          : bnn_fast_cuda_linear_backward_workspace(&problem));
    problem.workspace = workspace.mutable_data_ptr();
    auto launch = small ? bnn_fast_cuda_small_backward : bnn_fast_cuda_linear_backward;
    check_cuda(launch(&problem, device.stream()), "_variational_linear_backward");
  }

  // The fused kernels write it; what sample() left is summed here.
  Tensor kl() {
    if (regime != Regime::kDrawn) return value;
    double factor = a.divergence == kSampled ? 1.0 / static_cast<double>(a.samples) : 1.0;
    check_cuda(bnn_fast_cuda_sum(parts ? static_cast<const double*>(parts->const_data_ptr()) : nullptr, used, factor,
                                 value.mutable_data_ptr(), type_of_tensor(value, "kl"), device.stream()),
               "_variational_linear");
    return value;
  }

 private:
  Posterior bias_view() const { return a.bias ? a.bias->view : Posterior{}; }

  Tensor workspace_of(int64_t bytes) { return empty_of(a.weight.mu, {(bytes + 7) / 8}, ScalarType::Double); }

  // Where a sampling pass leaves the parts of its KL: after those of the passes before it.
  double* parts_for(const SampleForward& problem) {
    if (!parts) {
      const Posterior& p = a.weight.view;
      int64_t count = 0;
      auto add_blocks = [&](const Posterior& part) {
        SampleForward pass = problem;
        pass.posterior = part;
        count += bnn_fast_cuda_sample_forward_blocks(&pass);
      };
      if (a.bias) add_blocks(a.bias->view);
      for_row_blocks(p, a.samples, [&](int64_t first, int64_t rows) { add_blocks(p.slice(first, rows)); });
      parts = empty_of(a.weight.mu, {count}, ScalarType::Double);
    }
    double* next = static_cast<double*>(parts->mutable_data_ptr()) + used;
    used += bnn_fast_cuda_sample_forward_blocks(&problem);
    return next;
  }

  OnDevice device;
  const LinearArguments& a;
  Tensor value;
  OptionalTensor parts;
  int64_t used = 0;
};

}  // namespace
}  // namespace bnn_fast

BNN_FAST_IMPLEMENT(BNN_FAST_LIBRARY, BNN_FAST_CUDA_KEY, m) {
  m.impl("_variational_linear", TORCH_BOX(&bnn_fast::variational_linear<bnn_fast::Cuda>));
  m.impl("_variational_linear_backward", TORCH_BOX(&bnn_fast::variational_linear_backward<bnn_fast::Cuda>));
  m.impl("_noisy_linear", TORCH_BOX(&bnn_fast::noisy_linear<bnn_fast::Cuda>));
  m.impl("_noisy_linear_backward", TORCH_BOX(&bnn_fast::noisy_linear_backward<bnn_fast::Cuda>));
  m.impl("_linear_regime", TORCH_BOX(&bnn_fast::linear_regime<bnn_fast::Cuda>));
}
