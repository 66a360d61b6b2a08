// The variational linear layer on the CPU: its fused and narrow regimes, and the choice among the three. Kernels:
// linear.h, narrow.h.
#include <algorithm>
#include <cmath>
#include <memory>

#include "../noisy.h"
#include "launch.h"

namespace bnn_fast {
namespace {

// grad_bias[s] = sum_b grad_y[s, b]
template <class T> void sum_batch(const Tensor& grad_y, int64_t samples, int64_t batch, int64_t rows, void* grad_bias) {
  const T* data = static_cast<const T*>(grad_y.const_data_ptr());
  std::vector<double> sums(rows);
  for (int64_t s = 0; s < samples; ++s) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t b = 0; b < batch; ++b, data += rows)
      for (int64_t r = 0; r < rows; ++r) sums[r] += data[r];
    for (int64_t r = 0; r < rows; ++r) static_cast<T*>(grad_bias)[s * rows + r] = static_cast<T>(sums[r]);
  }
}

class Cpu {
 public:
  Regime regime = Regime::kDrawn;

  explicit Cpu(const LinearArguments& a) : like(a.weight.mu) {}

  static constexpr bool kKeepsNoise = true;

  void sample(const Posterior& p, int64_t divergence, int64_t samples, void* weight, Type type, void* noise = nullptr) {
    sum += bnn_fast::sample(p, divergence, samples, weight, type, kWeight, noise);
  }

  void sample_backward(const SampleBackward& problem) { run_spans(cpu_kernels().sample_backward, problem); }

  Tensor empty(const Tensor& t, const Shape& shape, ScalarType dtype) { return empty_large(t, shape, dtype); }

  static void factors(const Tensor& memory, const Posterior& normals) {
    memory.scalar_type() == ScalarType::Double ? factors_in<double>(memory, normals) : factors_in<float>(memory, normals);
  }

  // Narrow needs no packing and no GEMM, but its backward draws twice. Measured on two cores with AVX-512, from 8 x 8 to 64 x 64
  // weights, forward and backward: 0.7 to 1.05 of the fused regime's time up to batch 32, 0.4 to 0.7 of the drawn regime's
  // above; but with many samples of one row each, 2 of the fused regime's backward, and the two are level at 8 rows.
  //
  // Fused saves writing and reading the weights, but its products run at a part of the GEMM's rate: it pays while there are few
  // rows for each weight, and few are fewer where the weights stay in the cache anyway. Measured on one thread with AVX-512 (AVX2), a
  // step with the KL: drawn over fused is, from 256 x 256 to 1024 x 1024 weights, 0.80 to 1.05 (0.70 to 1.09) at batch 32, 0.78 to 0.98
  // (0.66 to 1.0) at 64, 0.79 to 0.96 (0.60 to 0.96) at 128; of 64 inputs and 256 outputs it crosses 1 between 32 and 64. With ten
  // samples, on two threads, whole steps of 64-256-256-10 at 64 and 784-400-400-10 at 128 took 1.2 and 1.03 of the fused regime's.
  // Where they match the GEMM (on two threads of a Zen 4), fused over drawn is 0.81 at 256 x 256 and 0.83 at 512 x 512 weights at batch 64, 0.86 at
  // 256 x 256 at 96, 0.90 at 128; on one thread 0.95, 0.97, 0.97 and 1.0; but of a first layer of 784 x 400, without dx, 1.05 and 1.12 at 64.
  // Where products here outrun the GEMM, a fused step took 0.61 to 0.99 of a drawn one's time, from 64 x 256 weights at 64 rows to 2048 x 2048
  // at 1024, with ten samples too; of nn.Linear's 0.95 at 4096 rows of 784 x 400, but 1.5 at 16,000, which no cache holds.
  static Regime choose(const Posterior& weight, ScalarType activations, int64_t samples, int64_t batch) {
    bool single = weight.type == Type::kFloat32 && activations == ScalarType::Float;
    bool narrow = weight.rows <= kNarrow && weight.columns <= kNarrow && (samples == 1 || batch >= 8);
    if (single && narrow && cpu_kernels().narrow_forward) return Regime::kSmall;
    int64_t size = weight.rows * weight.columns, most = size < 1 << 15 ? 32 : samples == 1 ? 48 : 128;
    if (single && samples == 1 && most == 48 && size <= 1 << 18 && fuses_middle_batches()) most = 96;
    if (single && size >= 1 << 13 && fuses_large_batches()) most = std::max(most, 4096 / samples);
    return batch <= most ? Regime::kFused : Regime::kDrawn;
  }

  Tensor fused_forward(const LinearArguments& a, const Tensor& x, int64_t batch) {
    if (regime == Regime::kSmall) return narrow_forward(a, x, batch);
    const Posterior& p = a.weight.view;
    OptionalTensor bias;
    if (a.bias) {
      bias = empty_of(x, {a.samples, p.rows}, compute_type(x.scalar_type()));
      sample(a.bias->view, a.divergence, a.samples, bias->mutable_data_ptr(), type_of_tensor(*bias, "bias"));
    }
    Tensor y = empty_of(x, a.output_shape(x), x.scalar_type());
    bool shared = a.shared(x);
    Tensor packed = pack_input(a.own_rows(x), p, shared ? batch : a.samples * batch);
    int64_t tasks = (p.rows + kOutputsPerTask - 1) / kOutputsPerTask;
    std::vector<double> kl(a.divergence == kNone ? 0 : tasks);
    LinearForward problem{p,
                          static_cast<int>(a.divergence),
                          a.samples,
                          batch,
                          packed.const_data_ptr(),
                          shared,
                          bias ? bias->const_data_ptr() : nullptr,
                          y.mutable_data_ptr(),
                          type_of_tensor(y, "y"),
                          kl.empty() ? nullptr : kl.data()};
    run(cpu_kernels().linear_forward, problem, tasks, kOutputsPerTask * p.columns);
    sum += sum_of(kl) / (a.divergence == kSampled ? static_cast<double>(a.samples) : 1.0);
    return y;
  }

  void fused_backward(const LinearArguments& a, const Tensor& x, const Tensor& grad_y, const KlGradient& grad_kl, bool need_x,
                      int64_t batch, LinearGradients& grads) {
    if (regime == Regime::kSmall) return narrow_backward(a, x, grad_y, grad_kl, need_x, batch, grads);
    const Posterior& p = a.weight.view;
    ScalarType type = compute_type(x.scalar_type());
    Tensor inputs = a.own_rows(x), outputs = dense(grad_y.scalar_type() == type ? grad_y : torch::stable::to(grad_y, type));
    if (need_x) grads.x = empty_of(x, shape_of(x), x.scalar_type());
    LinearBackward problem{p,
                           static_cast<int>(a.divergence),
                           a.samples,
                           batch,
                           type_of_tensor(x, "x"),
                           inputs.const_data_ptr(),
                           a.shared(x),
                           outputs.const_data_ptr(),
                           need_x ? grads.x.mutable_data_ptr() : nullptr,
                           grad_kl,
                           grads.weight_mu.mutable_data_ptr(),
                           grads.weight_rho.mutable_data_ptr()};
    int64_t block = column_block(p.columns), tasks = ((p.column_offset & 3) + p.columns + block - 1) / block;
    run(cpu_kernels().linear_backward, problem, tasks, block * p.rows);
    Tensor grad_bias = empty_of(x, {a.samples, p.rows}, type);
    auto sum_outputs = type == ScalarType::Double ? sum_batch<double> : sum_batch<float>;
    sum_outputs(outputs, a.samples, batch, p.rows, grad_bias.mutable_data_ptr());
    bias_backward(*this, a, grad_bias.const_data_ptr(), type_of_tensor(grad_bias, "grad_bias"), grad_kl, grads);
  }

  Tensor kl() const { return scalar_tensor(sum, like); }

 private:
  template <class S> static void factors_in(const Tensor& memory, Posterior normals) {
    S* f = static_cast<S*>(memory.mutable_data_ptr());
    std::fill(f, f + memory.numel(), S(0));
    f += kBeforeFactors;
    std::vector<S> zeros(normals.columns, 0), ones(normals.columns, 1);
    normals.mu = zeros.data(), normals.rho = ones.data();
    bnn_fast::sample(normals, kNone, 1, f, normals.type);
    for (int64_t i = 0; i < normals.columns; ++i) f[i] = std::copysign(std::sqrt(std::abs(f[i])), f[i]);
  }

  const Tensor& like;
  double sum = 0;

  // A row's part in the work, on the scale of weights that are drawn.
  static int64_t row_cost(const Posterior& p) { return 1 + (p.rows + p.columns) / 16 + p.rows * p.columns / 64; }

  Tensor narrow_forward(const LinearArguments& a, const Tensor& x, int64_t batch) {
    const Posterior& p = a.weight.view;
    auto weight = floats(a.samples * p.rows * p.columns), bias = floats(a.samples * p.rows);
    sample(p, a.divergence, a.samples, weight.get(), Type::kFloat32);
    if (a.bias) sample(a.bias->view, a.divergence, a.samples, bias.get(), Type::kFloat32);
    Tensor inputs = a.own_rows(x), y = empty_of(x, a.output_shape(x), x.scalar_type());
    NarrowForward problem{p.columns, p.rows, a.samples, batch, floats(inputs), a.shared(x), weight.get(),
                          a.bias ? bias.get() : nullptr, static_cast<float*>(y.mutable_data_ptr())};
    NarrowTasks tasks(a.samples, batch);
    run(cpu_kernels().narrow_forward, problem, tasks.count, tasks.rows * row_cost(p));
    return y;
  }

  void narrow_backward(const LinearArguments& a, const Tensor& x, const Tensor& grad_y, const KlGradient& grad_kl, bool need_x,
                       int64_t batch, LinearGradients& grads) {
    const Posterior& p = a.weight.view;
    int64_t size = p.rows * p.columns;
    Tensor inputs = a.own_rows(x), outputs = dense(grad_y);
    auto weight = floats(a.samples * size + 16);  // then their gradient
    if (need_x) {
      sample(p, kNone, a.samples, weight.get(), Type::kFloat32);
      grads.x = empty_of(x, shape_of(x), x.scalar_type());
    }
    NarrowTasks tasks(a.samples, batch);
    int64_t part = size + p.rows;
    auto partial = floats(tasks.count * part), grad_bias = floats(a.samples * p.rows);
    NarrowBackward problem{p.columns, p.rows, a.samples, batch, floats(inputs), a.shared(x), floats(outputs),
                           need_x ? weight.get() : nullptr,
                           need_x ? static_cast<float*>(grads.x.mutable_data_ptr()) : nullptr, partial.get()};
    run(cpu_kernels().narrow_backward, problem, tasks.count, 2 * tasks.rows * row_cost(p));
    for (int64_t s = 0; s < a.samples && batch > 0; ++s) {
      float* total = partial.get() + s * tasks.per_sample * part;
      for (int64_t t = 1; t < tasks.per_sample; ++t)
        for (int64_t i = 0; i < part; ++i) total[i] += total[t * part + i];
      for (int64_t o = 0; o < p.rows; ++o) {
        for (int64_t i = 0; i < p.columns; ++i) weight[s * size + o * p.columns + i] = total[i * p.rows + o];
        grad_bias[s * p.rows + o] = total[size + o];
      }
    }
    bool none = batch == 0;
    sample_backward(SampleBackward{p, static_cast<int>(a.divergence), a.samples, none ? nullptr : weight.get(), Type::kFloat32,
                                   grad_kl, grads.weight_mu.mutable_data_ptr(), grads.weight_rho.mutable_data_ptr()});
    bias_backward(*this, a, none ? nullptr : grad_bias.get(), Type::kFloat32, grad_kl, grads);
  }

  static std::unique_ptr<float[]> floats(int64_t n) { return std::make_unique_for_overwrite<float[]>(n); }
  static const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
};

}  // namespace
}  // namespace bnn_fast

STABLE_TORCH_LIBRARY_IMPL(bnn_fast, CPU, m) {
  m.impl("_variational_linear", TORCH_BOX(&bnn_fast::variational_linear<bnn_fast::Cpu>));
  m.impl("_variational_linear_backward", TORCH_BOX(&bnn_fast::variational_linear_backward<bnn_fast::Cpu>));
  m.impl("_noisy_linear", TORCH_BOX(&bnn_fast::noisy_linear<bnn_fast::Cpu>));
  m.impl("_noisy_linear_backward", TORCH_BOX(&bnn_fast::noisy_linear_backward<bnn_fast::Cpu>));
  m.impl("_linear_regime", TORCH_BOX(&bnn_fast::linear_regime<bnn_fast::Cpu>));
}
