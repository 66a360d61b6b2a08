// The variational linear layer on the CPU, forward and backward, in two regimes:
//
//   fused (small batch)  weights are drawn tile by tile and never written (linear.h)
//   drawn (large batch)  one pass draws the weights with their KL, the vendor's GEMM multiplies; backward, the same pass and
//                        GEMM give dx, another GEMM dW, and one pass turns dW into dmu and drho (sample.h)
#include "launch.h"

namespace bnn_fast {
namespace {

// Fused saves writing and reading the weights, but its products run at a part of the GEMM's rate: it pays while there are few
// rows for each weight, and few are fewer where the weights stay in the cache anyway. Measured on two cores with AVX-512,
// forward and backward: fused over drawn is 0.7 to 0.9 up to batch 128 from 256 x 256 weights on, with the crossing near
// 256; below, it crosses 1 between 32 and 64.
bool use_fused(const Posterior& weight, int64_t batch) {
  return batch <= (weight.rows * weight.columns >= 1 << 15 ? 128 : 32);
}

struct LinearArguments {
  PosteriorTensors weight;
  std::optional<PosteriorTensors> bias;
  int64_t divergence, samples;

  LinearArguments(const Tensor& weight_mu, const Tensor& weight_rho, const OptionalTensor& bias_mu, const OptionalTensor& bias_rho,
                  const Tensor& key, const PriorArguments& weight_prior, const PriorArguments& bias_prior, int64_t scale,
                  int64_t kl, int64_t n_samples, int64_t row_offset, int64_t column_offset)
      : weight(make_posterior(weight_mu, weight_rho, key, weight_prior, scale, 0, row_offset, column_offset)),
        divergence(kl),
        samples(n_samples) {
    check_divergence(kl);
    check_samples(n_samples);
    STD_TORCH_CHECK(weight_mu.dim() == 2, "weight_mu has shape ", describe(shape_of(weight_mu)), ", expected [out, in]");
    STD_TORCH_CHECK(bias_mu.has_value() == bias_rho.has_value(), "bias_mu and bias_rho are to be given together");
    if (!bias_mu) return;
    STD_TORCH_CHECK(shape_of(*bias_mu) == Shape{weight_mu.size(0)} && bias_mu->scalar_type() == weight_mu.scalar_type(),
                    "bias_mu has shape ", describe(shape_of(*bias_mu)), ", expected [", weight_mu.size(0),
                    "] and weight_mu's dtype");
    // A bias is one row; its columns are the weight's rows.
    bias = make_posterior(*bias_mu, *bias_rho, key, bias_prior, scale, 1, 0, row_offset);
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
    STD_TORCH_CHECK(x.is_cpu(), "x and weight_mu are on different devices");
    int64_t rows = rows_of(x);
    STD_TORCH_CHECK(samples == 1 || (x.dim() >= 2 && x.size(0) % samples == 0), "x has shape ", describe(shape_of(x)),
                    ", expected its first dimension to be a multiple of n_samples = ", samples);
    return rows / samples;
  }

  static int64_t rows_of(const Tensor& x) {
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
    return rows;
  }
};

// Activations in the layout of the fused kernels.
struct Packed {
  Tensor data;
  Pack problem;

  Packed(const Tensor& like, const Posterior& p, int64_t batch) : data(like) {
    bool wide = p.type == Type::kFloat64;
    int64_t lanes = wide ? 1 : cpu_kernels().lanes;
    int64_t shift = p.column_offset & 3;
    int64_t vectors = (shift + p.columns + 4 * lanes - 1) / (4 * lanes) * 4;
    data = empty_of(like, {vectors, batch, lanes}, wide ? ScalarType::Double : ScalarType::Float);
    problem = {batch, p.columns, shift, vectors, type_of_tensor(like, "x"), wide, nullptr, data.mutable_data_ptr()};
  }
  void fill_from(const Tensor& rows) {
    problem.rows = const_cast<void*>(rows.const_data_ptr());
    run(cpu_kernels().pack, problem, problem.vectors, problem.batch * cpu_kernels().lanes);
  }
  void write_to(Tensor& rows) {
    problem.rows = rows.mutable_data_ptr();
    run(cpu_kernels().unpack, problem, problem.batch, problem.columns);
  }
};

double fused_forward(const LinearArguments& a, const Tensor& x, const void* bias, int64_t batch, Tensor& y) {
  const Posterior& p = a.weight.view;
  Packed packed(x, p, a.samples * batch);
  packed.fill_from(x);
  int64_t tasks = (p.rows + kRowBlock - 1) / kRowBlock;
  std::vector<double> kl(a.divergence == kNone ? 0 : tasks);
  LinearForward problem{p, static_cast<int>(a.divergence), a.samples, batch, packed.problem.packed, bias, y.mutable_data_ptr(),
                        type_of_tensor(y, "y"), kl.empty() ? nullptr : kl.data()};
  run(cpu_kernels().linear_forward, problem, tasks, kRowBlock * p.columns);
  return sum_of(kl) / (a.divergence == kSampled ? static_cast<double>(a.samples) : 1.0);
}

// Rows of weights that are drawn at a time: all of them for one sample; for more, as many as keep the buffer no
// larger than the weights themselves (or a megabyte).
int64_t block_rows(const Posterior& p, int64_t samples) {
  int64_t capacity = p.rows * p.columns > (1 << 18) ? p.rows * p.columns : 1 << 18;
  int64_t per_row = samples * (p.columns > 0 ? p.columns : 1);
  int64_t rows = capacity / per_row;
  return rows < 1 ? 1 : rows > p.rows ? p.rows : rows;
}

// x [samples * batch, in], bias [samples, out]; y comes out as [samples, batch, out], or [batch, out] for one sample.
double drawn_forward(const LinearArguments& a, const Tensor& x, const OptionalTensor& bias, int64_t batch, Tensor& y) {
  const Posterior& p = a.weight.view;
  Type type = type_of_tensor(x, "x");
  if (a.samples == 1) {
    Tensor weight = empty_large(x, {p.rows, p.columns}, x.scalar_type());
    double kl = sample(p, a.divergence, 1, weight.mutable_data_ptr(), type);
    y = aten("aten::linear", "", x, weight, bias ? OptionalTensor(reshaped(*bias, {p.rows})) : OptionalTensor());
    return kl;
  }
  int64_t rows = block_rows(p, a.samples);
  Tensor inputs = reshaped(x, {a.samples, batch, p.columns});
  y = empty_of(x, {a.samples, batch, p.rows}, x.scalar_type());
  double kl = 0;
  for (int64_t r = 0; r < p.rows; r += rows) {
    int64_t count = r + rows < p.rows ? rows : p.rows - r;
    Tensor weight = empty_large(x, {a.samples, count, p.columns}, x.scalar_type());
    kl += sample(p.slice(r, count), a.divergence, a.samples, weight.mutable_data_ptr(), type);
    Tensor products = aten("aten::bmm", "", inputs, torch::stable::transpose(weight, 1, 2));
    if (bias) {
      Tensor all = reshaped(*bias, {a.samples, 1, p.rows});
      products = add(products, torch::stable::narrow(all, 2, r, count));
    }
    Tensor part = torch::stable::narrow(y, 2, r, count);
    torch::stable::copy_(part, products);
  }
  return kl;
}

std::tuple<Tensor, Tensor> variational_linear(const Tensor x, const Tensor weight_mu, const Tensor weight_rho,
                                              OptionalTensor bias_mu, OptionalTensor bias_rho, const Tensor key,
                                              OptionalTensor weight_loc, OptionalTensor weight_sd, OptionalTensor bias_loc,
                                              OptionalTensor bias_sd, double loc, double sd, double bias_loc_number,
                                              double bias_sd_number, int64_t scale, int64_t kl, int64_t n_samples,
                                              int64_t row_offset, int64_t column_offset) {
  LinearArguments a(weight_mu, weight_rho, bias_mu, bias_rho, key, {weight_loc, weight_sd, loc, sd},
                    {bias_loc, bias_sd, bias_loc_number, bias_sd_number}, scale, kl, n_samples, row_offset, column_offset);
  int64_t batch = a.check_input(x);
  bool fused = use_fused(a.weight.view, batch);
  Tensor rows = dense(x);
  Shape shape = shape_of(x);
  shape.back() = a.outputs();

  double sum = 0;
  OptionalTensor bias;
  if (a.bias) {
    ScalarType type = fused ? compute_type(x.scalar_type()) : x.scalar_type();
    bias = empty_of(x, {n_samples, a.outputs()}, type);
    sum = sample(a.bias->view, kl, n_samples, bias->mutable_data_ptr(), type_of_tensor(*bias, "bias"));
  }
  Tensor y = x;
  if (fused) {
    y = empty_of(x, shape, x.scalar_type());
    sum += fused_forward(a, rows, bias ? bias->const_data_ptr() : nullptr, batch, y);
  } else {
    rows = reshaped(dense_detached(x), {n_samples * batch, a.inputs()});
    sum += drawn_forward(a, rows, bias, batch, y);
    y = reshaped(y, shape);
  }
  return {y, scalar_tensor(sum, weight_mu)};
}

// Gradients as they are put together; those that do not apply stay empty.
struct LinearGradients {
  Tensor x, weight_mu, weight_rho, bias_mu, bias_rho;
};

// The sum of each row of [rows, n].
template <class T> void sum_rows(const Tensor& t, int64_t samples, int64_t batch, int64_t rows, void* out) {
  const T* data = static_cast<const T*>(t.const_data_ptr());
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t b = 0; b < batch; ++b) sum += data[(r * samples + s) * batch + b];
      static_cast<T*>(out)[s * rows + r] = static_cast<T>(sum);
    }
}

void fused_backward(const LinearArguments& a, const Tensor& x, const Tensor& grad_y, const KlGradient& grad_kl, bool need_x,
                    int64_t batch, LinearGradients& grads, Tensor& grad_bias) {
  const Posterior& p = a.weight.view;
  int64_t all = a.samples * batch;
  ScalarType type = compute_type(x.scalar_type());
  Tensor outputs = torch::stable::transpose(reshaped(dense_detached(grad_y), {all, p.rows}), 0, 1);
  if (outputs.scalar_type() != type) outputs = torch::stable::to(outputs, type);
  Tensor by_output = dense(outputs);
  Packed packed(x, p, all);
  packed.fill_from(dense(x));
  std::optional<Packed> back;
  if (need_x) back.emplace(x, p, all);
  LinearBackward problem{p,
                         static_cast<int>(a.divergence),
                         a.samples,
                         batch,
                         packed.problem.packed,
                         by_output.const_data_ptr(),
                         back ? back->problem.packed : nullptr,
                         grad_kl,
                         grads.weight_mu.mutable_data_ptr(),
                         grads.weight_rho.mutable_data_ptr()};
  int64_t block = column_block(p.columns), padded = packed.problem.vectors * packed.data.size(2);
  run(cpu_kernels().linear_backward, problem, (padded + block - 1) / block, block * p.rows);
  if (back) {
    grads.x = empty_of(x, shape_of(x), x.scalar_type());
    back->write_to(grads.x);
  }
  grad_bias = empty_of(x, {a.samples, p.rows}, type);
  auto sum = type == ScalarType::Double ? sum_rows<double> : sum_rows<float>;
  sum(by_output, a.samples, batch, p.rows, grad_bias.mutable_data_ptr());
}

void drawn_backward(const LinearArguments& a, const Tensor& x, const Tensor& grad_y, const KlGradient& grad_kl, bool need_x,
                    int64_t batch, LinearGradients& grads, Tensor& grad_bias) {
  const Posterior& p = a.weight.view;
  Type type = type_of_tensor(x, "x");
  int64_t all = a.samples * batch;
  Tensor inputs = reshaped(dense_detached(x), {all, p.columns}), outputs = reshaped(dense_detached(grad_y), {all, p.rows});
  auto put_together = [&](const Posterior& part, const Tensor& grad_weight, int64_t offset) {
    run_spans(cpu_kernels().sample_backward,
              SampleBackward{part, static_cast<int>(a.divergence), a.samples, grad_weight.const_data_ptr(), type, grad_kl,
                             static_cast<char*>(grads.weight_mu.mutable_data_ptr()) + offset,
                             static_cast<char*>(grads.weight_rho.mutable_data_ptr()) + offset});
  };
  if (a.samples == 1) {
    // The weights, then their gradient, can stand where the gradient of rho will be.
    Tensor weight = type == p.type ? grads.weight_rho : empty_large(x, {p.rows, p.columns}, x.scalar_type());
    if (need_x) {
      sample(p, kNone, 1, weight.mutable_data_ptr(), type);
      grads.x = reshaped(aten("aten::mm", "", outputs, weight), shape_of(x));
    }
    aten("aten::mm", "out", torch::stable::transpose(outputs, 0, 1), inputs, weight);
    put_together(p, weight, 0);
    grad_bias = torch::stable::sum(outputs, Shape{0});
    return;
  }
  int64_t rows = block_rows(p, a.samples);
  inputs = reshaped(inputs, {a.samples, batch, p.columns});
  outputs = reshaped(outputs, {a.samples, batch, p.rows});
  if (need_x) grads.x = torch::stable::new_zeros(x, {a.samples, batch, p.columns});
  for (int64_t r = 0; r < p.rows; r += rows) {
    int64_t count = r + rows < p.rows ? rows : p.rows - r;
    Posterior part = p.slice(r, count);
    Tensor weight = empty_large(x, {a.samples, count, p.columns}, x.scalar_type());
    Tensor columns = torch::stable::narrow(outputs, 2, r, count);
    if (need_x) {
      sample(part, kNone, a.samples, weight.mutable_data_ptr(), type);
      grads.x = add(grads.x, aten("aten::bmm", "", columns, weight));
    }
    aten("aten::bmm", "out", torch::stable::transpose(columns, 1, 2), inputs, weight);
    put_together(part, weight, r * p.columns * size_of(p.type));
  }
  if (need_x) grads.x = reshaped(grads.x, shape_of(x));
  grad_bias = torch::stable::sum(outputs, Shape{1});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> variational_linear_backward(
    OptionalTensor grad_y, OptionalTensor grad_kl, OptionalTensor x, const Tensor weight_mu, const Tensor weight_rho,
    OptionalTensor bias_mu, OptionalTensor bias_rho, const Tensor key, OptionalTensor weight_loc, OptionalTensor weight_sd,
    OptionalTensor bias_loc, OptionalTensor bias_sd, double loc, double sd, double bias_loc_number, double bias_sd_number,
    int64_t scale, int64_t kl, int64_t n_samples, int64_t row_offset, int64_t column_offset, bool need_grad_x) {
  LinearArguments a(weight_mu, weight_rho, bias_mu, bias_rho, key, {weight_loc, weight_sd, loc, sd},
                    {bias_loc, bias_sd, bias_loc_number, bias_sd_number}, scale, kl, n_samples, row_offset, column_offset);
  STD_TORCH_CHECK(x || !grad_y, "x is absent, expected it with grad_y");
  const Posterior& p = a.weight.view;
  KlGradient k = make_kl_gradient(grad_kl, false);
  auto like = [](const Tensor& t) { return empty_large(t, shape_of(t), t.scalar_type()); };
  auto none = [&] { return empty_of(weight_mu, {0}, weight_mu.scalar_type()); };  // outputs may not alias
  LinearGradients grads{none(), like(weight_mu), like(weight_mu), a.bias ? like(*bias_mu) : none(),
                        a.bias ? like(*bias_mu) : none()};

  Tensor grad_bias = grads.x;
  if (grad_y) {
    int64_t batch = a.check_input(*x);
    Shape shape = shape_of(*x);
    shape.back() = a.outputs();
    STD_TORCH_CHECK(shape_of(*grad_y) == shape && grad_y->scalar_type() == x->scalar_type(), "grad_y has shape ",
                    describe(shape_of(*grad_y)), ", expected ", describe(shape), " and x's dtype");
    auto backward = use_fused(p, batch) ? fused_backward : drawn_backward;
    backward(a, *x, *grad_y, k, need_grad_x, batch, grads, grad_bias);
  } else {
    run_spans(cpu_kernels().sample_backward,
              SampleBackward{p, static_cast<int>(kl), n_samples, nullptr, p.type, k, grads.weight_mu.mutable_data_ptr(),
                             grads.weight_rho.mutable_data_ptr()});
  }
  if (a.bias) {
    const void* by_bias = grad_y ? grad_bias.const_data_ptr() : nullptr;
    run_spans(cpu_kernels().sample_backward,
              SampleBackward{a.bias->view, static_cast<int>(kl), n_samples, by_bias, type_of_tensor(grad_bias, "grad_bias"), k,
                             grads.bias_mu.mutable_data_ptr(), grads.bias_rho.mutable_data_ptr()});
  }
  return {grads.x, grads.weight_mu, grads.weight_rho, grads.bias_mu, grads.bias_rho};
}

}  // namespace
}  // namespace bnn_fast

STABLE_TORCH_LIBRARY_IMPL(bnn_fast, CPU, m) {
  m.impl("_variational_linear", TORCH_BOX(&bnn_fast::variational_linear));
  m.impl("_variational_linear_backward", TORCH_BOX(&bnn_fast::variational_linear_backward));
}
