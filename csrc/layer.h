// The variational linear layer as every device sees it: arguments and their checks, the two operators, and the large-batch regime,
// which is drawing and the vendor's GEMM.
//
//   small, fused         (few weights; small batch, or a large one where the device's kernels outrun the vendor's GEMM) products by
//                        those kernels, of which the fused ones draw the weights tile by tile and never write them
//   drawn (large batch)  one pass draws the weights with their KL, the vendor's GEMM multiplies; backward, the same pass and
//                        GEMM give dx, another GEMM dW, and one pass turns dW into dmu and drho, where the device can and there
//                        is one sample with the noise that the first of these passes left
//
// A Device brings what differs (cpu/variational_linear.cpp, cuda/bind_variational_linear.cpp):
//   Device(a)                                                 for the length of one operator's call
//   void sample(posterior, divergence, samples, weight, type, noise)   draws weights, none if weight is null; adds to the KL
//   static constexpr bool kKeepsNoise                           whether it knows `noise`, that of SampleForward, or it has to be null
//   void sample_backward(problem)
//   Tensor empty(like, shape, dtype)                            fresh memory for something as large as the weights
//   static Regime choose(posterior, x's dtype, samples, batch)  the choice among the regimes
//   Regime regime                                               of this call, as chosen
//   Tensor fused_forward(a, x, batch)                           y; adds to the KL; x may be shared by the samples
//   void fused_backward(a, x, grad_y, grad_kl, batch, grads)
//   Tensor kl()
#pragma once

#include "arguments.h"

namespace bnn_fast {

// Their numbers are what _linear_regime returns.
enum class Regime { kSmall, kFused, kDrawn };

struct LinearArguments {
  PosteriorTensors weight;
  std::optional<PosteriorTensors> bias;
  int64_t divergence, samples;

  LinearArguments(const Lists& lists, const OptionalTensor& key, const Options& options)
      : weight(lists.pair(0, key, options)), divergence(options.divergence), samples(options.samples) {
    const Tensor& weight_mu = lists.posterior[0];
    STD_TORCH_CHECK(weight_mu.dim() == 2, "weight_mu has shape ", describe(shape_of(weight_mu)), ", expected [out, in]");
    if (!lists.has(1)) return;
    const Tensor& bias_mu = lists.posterior[2];
    STD_TORCH_CHECK(bias_mu.sizes() == Shape{weight_mu.size(0)} && bias_mu.scalar_type() == weight_mu.scalar_type(),
                    "bias_mu has shape ", describe(shape_of(bias_mu)), ", expected [", weight_mu.size(0),
                    "] and weight_mu's dtype");
    Options of_bias = options;  // one row; its columns are the weight's rows
    of_bias.stream = options.stream + 1;
    of_bias.row_offset = 0;
    of_bias.column_offset = options.row_offset;
    bias = lists.pair(1, key, of_bias);
  }

  int64_t outputs() const { return weight.view.rows; }
  int64_t inputs() const { return weight.view.columns; }

  // x seen as [samples * batch, in]; returns batch.
  int64_t check_input(const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == inputs(), "x has shape ", describe(shape_of(x)), ", expected [..., ",
                    inputs(), "]");
    bool low = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
    STD_TORCH_CHECK(x.scalar_type() == weight.mu.scalar_type() || (low && weight.mu.scalar_type() == ScalarType::Float),
                    "x and weight_mu have different dtypes");
    STD_TORCH_CHECK(on_device_of(x, weight.mu), "x and weight_mu are on different devices");
    check_storage(x, "x");
    int64_t rows = rows_of(x);
    STD_TORCH_CHECK(samples == 1 || (x.dim() >= 2 && x.size(0) % samples == 0), "x has shape ", describe(shape_of(x)),
                    ", expected its first dimension to be a multiple of n_samples = ", samples);
    return rows / samples;
  }

  // Whether all samples have the same rows of x, expanded along dimension 0.
  bool shared(const Tensor& x) const { return samples > 1 && x.size(0) == samples && x.stride(0) == 0; }

  // x, dense; of one sample where they share it.
  Tensor own_rows(Tensor x) const { return dense(shared(x) ? torch::stable::narrow(x, 0, 0, 1) : x); }

  static int64_t rows_of(const Tensor& x) {
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
    return rows;
  }

  Shape output_shape(const Tensor& x) const {
    Shape shape = shape_of(x);
    shape.back() = outputs();
    return shape;
  }
};

// The weights' rows in the blocks that are drawn at a time: all of them for one sample; for more, as many as keep the buffer
// no larger than the weights themselves (or a megabyte). Calls body(first, count).
template <class Body> void for_row_blocks(const Posterior& p, int64_t samples, Body body) {
  int64_t capacity = p.rows * p.columns > (1 << 18) ? p.rows * p.columns : 1 << 18;
  int64_t rows = capacity / (samples * (p.columns > 0 ? p.columns : 1));
  if (rows < 1) rows = 1;
  for (int64_t r = 0; r < p.rows; r += rows) body(r, r + rows < p.rows ? rows : p.rows - r);
}

// x of the drawn regime: [samples, batch, in] of several samples, [batch, in] of one and of all where they share it.
//
// Where they do one GEMM may take the weights of all samples as [samples * outputs, in], and does where each sample has few outputs, at
// which a bmm is slow, by a factor of up to ten. With more, putting the result into the order of y (or g into that of the weights)
// costs what it saves: measured on two cores with AVX-512, level at about 64.
struct DrawnInput {
  static constexpr int64_t kFewOutputs = 64;
  Tensor by_sample, of_all;
  bool shared;

  DrawnInput(const LinearArguments& a, const Tensor& x, int64_t batch) : shared(a.shared(x)) {
    Tensor rows = a.own_rows(detached(x));
    Shape of_one{batch, a.inputs()}, of_each{a.samples, batch, a.inputs()};
    if (shared || a.samples == 1) of_all = reshaped(rows, of_one);
    if (shared)
      by_sample = aten("aten::expand", "", of_all, of_each, false);
    else if (a.samples > 1)
      by_sample = reshaped(rows, of_each);
  }

  bool one_gemm(const Tensor& weight) const { return shared && weight.size(1) < kFewOutputs; }

  // x w_s^T of weights [samples, outputs, in], as [samples, batch, outputs]
  Tensor products(const Tensor& weight) const {
    if (!one_gemm(weight)) return aten("aten::bmm", "", by_sample, torch::stable::transpose(weight, 1, 2));
    Tensor found = aten("aten::mm", "", of_all, torch::stable::transpose(rows_of_all(weight), 0, 1));
    return torch::stable::transpose(reshaped(found, {of_all.size(0), weight.size(0), weight.size(1)}), 0, 1);
  }

  // grad_weight = g_s^T x of g [samples, batch, outputs]
  void gradient(const Tensor& g, Tensor& grad_weight) const {
    Tensor by_output = torch::stable::transpose(g, 1, 2);
    if (one_gemm(grad_weight))
      aten("aten::mm", "out", rows_of_all(by_output), of_all, rows_of_all(grad_weight));
    else
      aten("aten::bmm", "out", by_output, by_sample, grad_weight);
  }

 private:
  static Tensor rows_of_all(const Tensor& t) { return reshaped(t, {t.size(0) * t.size(1), t.size(2)}); }
};

// y as [samples, batch, out], or [batch, out] for one sample.
template <class Device> Tensor drawn_forward(Device& device, const LinearArguments& a, const Tensor& x, int64_t batch) {
  const Posterior& p = a.weight.view;
  ScalarType dtype = x.scalar_type();
  Type type = type_of_tensor(x, "x");
  OptionalTensor bias;
  if (a.bias) {
    bias = empty_of(x, {a.samples, p.rows}, dtype);
    device.sample(a.bias->view, a.divergence, a.samples, bias->mutable_data_ptr(), type);
  }
  DrawnInput inputs(a, x, batch);
  if (a.samples == 1) {
    Tensor weight = device.empty(x, {p.rows, p.columns}, dtype);
    device.sample(p, a.divergence, 1, weight.mutable_data_ptr(), type);
    return aten("aten::linear", "", inputs.of_all, weight, bias ? OptionalTensor(reshaped(*bias, {p.rows})) : OptionalTensor());
  }
  Tensor y = empty_of(x, {a.samples, batch, p.rows}, dtype);
  for_row_blocks(p, a.samples, [&](int64_t first, int64_t count) {
    Tensor weight = device.empty(x, {a.samples, count, p.columns}, dtype);
    device.sample(p.slice(first, count), a.divergence, a.samples, weight.mutable_data_ptr(), type);
    Tensor products = inputs.products(weight);
    if (bias) {
      Tensor all = reshaped(*bias, {a.samples, 1, p.rows});
      products = add(products, torch::stable::narrow(all, 2, first, count));
    }
    Tensor part = torch::stable::narrow(y, 2, first, count);
    torch::stable::copy_(part, products);
  });
  return y;
}

// x's stays empty where it is not needed.
struct LinearGradients {
  Tensor x, weight_mu, weight_rho;
  OptionalTensor bias_mu, bias_rho;
};

// What is left of the backward once the bias's gradient is known, by sample: [samples, out], or null.
template <class Device>
void bias_backward(Device& device, const LinearArguments& a, const void* grad_bias, Type type, const KlGradient& grad_kl,
                   LinearGradients& grads) {
  if (!a.bias) return;
  device.sample_backward(SampleBackward{a.bias->view, static_cast<int>(a.divergence), a.samples, grad_bias, type, grad_kl,
                                        grads.bias_mu->mutable_data_ptr(), grads.bias_rho->mutable_data_ptr()});
}

template <class Device>
void drawn_backward(Device& device, const LinearArguments& a, const Tensor& x, const Tensor& grad_y, const KlGradient& grad_kl,
                    bool need_x, int64_t batch, LinearGradients& grads) {
  const Posterior& p = a.weight.view;
  Type type = type_of_tensor(x, "x");
  int64_t all = a.samples * batch;
  DrawnInput inputs(a, x, batch);
  Tensor outputs = reshaped(dense_detached(grad_y), {all, p.rows});
  auto put_together = [&](const Posterior& part, const Tensor& grad_weight, int64_t offset, const void* noise = nullptr) {
    SampleBackward problem{part, static_cast<int>(a.divergence), a.samples, grad_weight.const_data_ptr(), type, grad_kl,
                           static_cast<char*>(grads.weight_mu.mutable_data_ptr()) + offset,
                           static_cast<char*>(grads.weight_rho.mutable_data_ptr()) + offset};
    problem.noise = noise;
    device.sample_backward(problem);
  };
  auto sum_to_bias = [&](int64_t batch_dimension) {
    Tensor sums = torch::stable::sum(outputs, Shape{batch_dimension});
    bias_backward(device, a, sums.const_data_ptr(), type, grad_kl, grads);
  };
  if (a.samples == 1) {
    // The weights, then their gradient, can stand where the gradient of rho will be, and their noise where that of mu will.
    Tensor weight = type == p.type ? grads.weight_rho : device.empty(x, {p.rows, p.columns}, x.scalar_type());
    bool exact = type == p.type && compute_type(x.scalar_type()) == x.scalar_type();
    void* noise = Device::kKeepsNoise && need_x && exact ? grads.weight_mu.mutable_data_ptr() : nullptr;
    if (need_x) {
      device.sample(p, kNone, 1, weight.mutable_data_ptr(), type, noise);
      grads.x = reshaped(aten("aten::mm", "", outputs, weight), shape_of(x));
    }
    aten("aten::mm", "out", torch::stable::transpose(outputs, 0, 1), inputs.of_all, weight);
    put_together(p, weight, 0, noise);
    return sum_to_bias(0);
  }
  outputs = reshaped(outputs, {a.samples, batch, p.rows});
  if (need_x) grads.x = torch::stable::new_zeros(x, {a.samples, batch, p.columns});
  for_row_blocks(p, a.samples, [&](int64_t first, int64_t count) {
    Posterior part = p.slice(first, count);
    Tensor weight = device.empty(x, {a.samples, count, p.columns}, x.scalar_type());
    Tensor columns = torch::stable::narrow(outputs, 2, first, count);
    if (need_x) {
      device.sample(part, kNone, a.samples, weight.mutable_data_ptr(), type);
      grads.x = add(grads.x, aten("aten::bmm", "", columns, weight));
    }
    inputs.gradient(columns, weight);
    put_together(part, weight, first * p.columns * size_of(p.type));
  });
  if (need_x) grads.x = reshaped(grads.x, shape_of(x));
  sum_to_bias(1);
}

// The regime that both operators choose for a layer of these weights on x.
template <class Device> int64_t linear_regime(const Tensor x, const Tensor weight_mu, int64_t n_samples) {
  Tensors posterior{weight_mu, weight_mu};
  Tensors prior;
  Numbers numbers{0, 1};
  LinearArguments a(Lists(posterior, prior, numbers, true), {}, options_of({kSoftplus, 0, kNone, n_samples, 0, 0, 0}));
  return static_cast<int64_t>(Device::choose(a.weight.view, x.scalar_type(), n_samples, a.check_input(x)));
}

template <class Device> std::tuple<Tensor, Tensor> layer_forward(const LinearArguments& a, const Tensor& x) {
  int64_t batch = a.check_input(x);
  Device device(a);
  device.regime = Device::choose(a.weight.view, x.scalar_type(), a.samples, batch);
  Tensor y = device.regime == Regime::kDrawn ? drawn_forward(device, a, x, batch) : device.fused_forward(a, x, batch);
  return {reshaped(y, a.output_shape(x)), device.kl()};
}

template <class Device>
Tensors layer_backward(const LinearArguments& a, const OptionalTensors& given, const OptionalTensor& x, bool need_grad_x) {
  check_gradients(given, {"grad_y", "grad_kl"});
  const OptionalTensor &grad_y = given[0], &grad_kl = given[1];
  STD_TORCH_CHECK(x || !grad_y, "x is absent, expected it with grad_y");
  const Tensor& weight_mu = a.weight.mu;
  if (grad_kl) check_gradient(*grad_kl, "grad_kl", {}, compute_type(weight_mu.scalar_type()), weight_mu);
  KlGradient k = make_kl_gradient(grad_kl, false);
  Device device(a);
  auto like = [&](const Tensor& t) { return device.empty(t, shape_of(t), t.scalar_type()); };
  LinearGradients grads{empty_of(weight_mu, {0}, weight_mu.scalar_type()), like(weight_mu), like(weight_mu), {}, {}};
  if (a.bias) grads.bias_mu = like(a.bias->mu), grads.bias_rho = like(a.bias->mu);
  if (grad_y) {
    int64_t batch = a.check_input(*x);
    Shape shape = a.output_shape(*x);
    check_gradient(*grad_y, "grad_y", shape, x->scalar_type(), weight_mu);
    device.regime = Device::choose(a.weight.view, x->scalar_type(), a.samples, batch);
    if (device.regime == Regime::kDrawn)
      drawn_backward(device, a, *x, *grad_y, k, need_grad_x, batch, grads);
    else
      device.fused_backward(a, *x, *grad_y, k, need_grad_x, batch, grads);
  } else {
    device.sample_backward(SampleBackward{a.weight.view, static_cast<int>(a.divergence), a.samples, nullptr, a.weight.view.type,
                                          k, grads.weight_mu.mutable_data_ptr(), grads.weight_rho.mutable_data_ptr()});
    bias_backward(device, a, nullptr, a.weight.view.type, k, grads);
  }
  if (!a.bias) return {grads.x, grads.weight_mu, grads.weight_rho};
  return {grads.x, grads.weight_mu, grads.weight_rho, *grads.bias_mu, *grads.bias_rho};
}

template <class Device>
std::tuple<Tensor, Tensor> variational_linear(const Tensor& x, const Tensors& posterior, const Tensor& key,
                                              const Tensors& prior, const Numbers& numbers, const Integers& options) {
  return layer_forward<Device>(LinearArguments(Lists(posterior, prior, numbers, true), key, options_of(options)), x);
}

template <class Device>
Tensors variational_linear_backward(const OptionalTensors& given, const OptionalTensor& x, const Tensors& posterior,
                                    const Tensor& key, const Tensors& prior, const Numbers& numbers,
                                    const Integers& options, bool need_grad_x) {
  LinearArguments a(Lists(posterior, prior, numbers, true), key, options_of(options));
  return layer_backward<Device>(a, given, x, need_grad_x);
}

}  // namespace bnn_fast
