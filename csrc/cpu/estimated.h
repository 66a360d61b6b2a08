// The variational linear layer by the estimators "local" and "flipout" on the CPU: a call, and the choice between the fused regime
// and that of the vendor's GEMMs. Formulas and kernels: estimators.h. Operators: ../estimated.h.
//
// Activations are computed in float32, or in double: squares and quotients would leave the range of 16 bits. They are seen as
// [samples, examples, everything else], and their noise as such too, from the row on that the key's third number says.
#pragma once

#include "../estimated.h"
#include "signs.h"

namespace bnn_fast {

template <class T> T* data(const Tensor& t) { return static_cast<T*>(const_cast<void*>(t.const_data_ptr())); }

class Estimated {
 public:
  Estimated(const LinearArguments& a, const Tensor& x, int64_t estimator, bool may_share)
      : a_(a), p_(a.weight.view), x_(x), estimator_(static_cast<int>(estimator)), batch_(a.check_input(x)),
        rows_(a.samples * batch_), examples_(x.dim() > 1 ? x.size(0) / a.samples : 1), type_(compute_type(x.scalar_type())) {
    const auto* key = data<int64_t>(*a.weight.key);
    signs_ = {key, a.samples, examples_, a.weight.key->size(0) == 3 ? key[2] : 0};
    input_ = dense(x.scalar_type() == type_ ? x : torch::stable::to(x, type_));
    input_ = reshaped(input_, {rows_, p_.columns});
    if (may_share && local() && a.samples > 1 && alike()) {
      rows_ = batch_;
      input_ = torch::stable::narrow(input_, 0, 0, rows_);
    }
  }

  std::tuple<Tensor, Tensor, Tensor> forward() {
    return type_ == ScalarType::Double ? forward_in<double>() : forward_in<float>();
  }

  void backward(const Tensor& grad_y, const KlGradient& grad_kl, bool need_x, const OptionalTensor& kept, LinearGradients& grads) {
    if (type_ == ScalarType::Double)
      backward_in<double>(grad_y, grad_kl, need_x, kept, grads);
    else
      backward_in<float>(grad_y, grad_kl, need_x, kept, grads);
  }

  static Tensor empty_like(const Tensor& t) { return empty_large(t, shape_of(t), t.scalar_type()); }
  static void sample_backward(const LinearArguments&, const SampleBackward& problem) { run_spans(cpu_kernels().sample_backward, problem); }

 private:
  // Whether the input is the same for all samples: where it is not, the first comparison usually says so.
  bool alike() const {
    auto bytes = static_cast<size_t>(batch_ * p_.columns * size_of(type()));
    const char* first = data<char>(input_);
    for (int64_t s = 1; s < a_.samples; ++s)
      if (memcmp(first, first + static_cast<size_t>(s) * bytes, bytes) != 0) return false;
    return true;
  }

  // Fused saves passes over what is as large as the weights; the GEMMs have the better rate where there are many rows. Measured on
  // one busy core with AVX2 at 1024 x 1024, forward and backward: fused over GEMMs is 1.0 to 1.2 at 32 rows, 1.1 to 1.5 at 64. Where
  // products here outrun the GEMM it is 0.6 at 64 rows and 0.8 at 512, on two threads; but then no more than keep the parts of dx, one
  // for each of 16 tasks, no larger than the weights.
  bool fused() const { return rows_ <= 32 || (type_ == ScalarType::Float && rows_ * 16 <= p_.rows && fuses_large_batches()); }

  // Rows of the activations that are of one example.
  int64_t per_example() const { return examples_ > 0 ? batch_ / examples_ : 0; }

  // Activations' rows as the kernels see them (problem.h).
  int64_t kernel_batch() const { return local() ? rows_ : batch_; }

  bool local() const { return estimator_ == kLocal; }
  Tensor empty(const Shape& shape) const { return empty_large(input_, shape, type_); }
  Type type() const { return type_ == ScalarType::Double ? Type::kFloat64 : Type::kFloat32; }

  // mu in the type computed in.
  Tensor in_type(const Tensor& mu) const { return dense_detached(mu.scalar_type() == type_ ? mu : torch::stable::to(mu, type_)); }

  void sample(const Posterior& p, Tensor& to, int estimator) {
    kl_ += bnn_fast::sample(p, a_.divergence, a_.samples, to.mutable_data_ptr(), type(), estimator);
  }

  // z of the formulas.
  template <class T> Tensor second_input() const {
    Tensor z = empty({rows_, p_.columns});
    if (!local()) {
      signs_.copy<T>(data<T>(input_), data<T>(z), p_.columns * per_example(), kInputSigns);
      return z;
    }
    const T* from = data<T>(input_);
    for_each(rows_ * p_.columns, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) data<T>(z)[i] = from[i] * from[i];
    });
    return z;
  }

  // q of the formulas for these weights: [samples, count, in], of local [count, in].
  Shape second_shape(int64_t rows) const {
    return local() || a_.samples == 1 ? Shape{rows, p_.columns} : Shape{a_.samples, rows, p_.columns};
  }

  static Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, t.dim() - 2, t.dim() - 1); }

  // [samples, batch, columns] of what is multiplied by q.
  Tensor by_sample(const Tensor& t) const {
    return local() || a_.samples == 1 ? reshaped(t, {rows_, t.size(-1)}) : reshaped(t, {a_.samples, batch_, t.size(-1)});
  }

  static Tensor columns_of(Tensor t, int64_t begin, int64_t count) {
    return count == t.size(1) ? t : dense(torch::stable::narrow(t, 1, begin, count));
  }

  static Tensor product(const Tensor& left, const Tensor& right) {
    return aten(right.dim() == 2 ? "aten::mm" : "aten::bmm", "", left, right);
  }

  template <class T> std::tuple<Tensor, Tensor, Tensor> forward_in() {
    Tensor z = second_input<T>(), first = empty({rows_, p_.rows}), second = empty({rows_, p_.rows});
    if (fused()) {
      Tensor packed = pack_input(input_, p_, rows_), packed_second = pack_input(z, p_, rows_);
      int64_t tasks = (p_.rows + kOutputsPerTask - 1) / kOutputsPerTask;
      std::vector<double> kl(a_.divergence == kNone ? 0 : tasks);
      EstimatedForward problem{p_, static_cast<int>(a_.divergence), estimator_, a_.samples, kernel_batch(), packed.const_data_ptr(),
                               packed_second.const_data_ptr(), first.mutable_data_ptr(), second.mutable_data_ptr(),
                               kl.empty() ? nullptr : kl.data()};
      run(cpu_kernels().estimated_forward, problem, tasks, kOutputsPerTask * p_.columns);
      kl_ += sum_of(kl) / (a_.divergence == kSampled ? static_cast<double>(a_.samples) : 1.0);
    } else {
      first = product(input_, transposed(in_type(a_.weight.mu)));
      for_row_blocks(p_, local() ? 1 : a_.samples, [&](int64_t begin, int64_t count) {
        Tensor q = empty(second_shape(count));
        sample(p_.slice(begin, count), q, estimator_);
        Tensor part = product(by_sample(z), transposed(q));
        if (count == p_.rows) {
          second = part;
        } else {
          Tensor to = torch::stable::narrow(second, 1, begin, count);
          torch::stable::copy_(to, reshaped(part, {rows_, count}));
        }
      });
    }
    Tensor y = empty_of(x_, a_.output_shape(x_), x_.scalar_type());
    Tensor kept = empty_of(x_, local() ? a_.output_shape(x_) : Shape{0}, type_);
    if (a_.bias) add_bias<T>(data<T>(first), data<T>(second));
    if (local()) {
      int64_t columns = p_.rows * per_example();
      Posterior outputs{examples_, columns, type(), first.const_data_ptr(), second.const_data_ptr(), kSoftplus, {0, 1, nullptr, nullptr},
                        signs_.key, kOutputNoise, signs_.first_row, 0};
      LocalOutputs problem{outputs, a_.samples, rows_ == batch_, y.mutable_data_ptr(), type_of_tensor(y, "y"), kept.mutable_data_ptr()};
      run_spans(cpu_kernels().local_outputs, problem);
    } else {
      signs_.copy<T>(data<T>(second), data<T>(second), p_.rows * per_example(), kOutputSigns);
      T *sum = data<T>(first), *part = data<T>(second);
      for_each(rows_ * p_.rows, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sum[i] += part[i];
      });
      torch::stable::copy_(y, reshaped(first, a_.output_shape(x_)));
    }
    return {y, scalar_tensor(kl_, a_.weight.mu), kept};
  }

  // Of local its mean to the first and its variance to the second sums; of flipout a draw to the first.
  template <class T> void add_bias(T* first, T* second) {
    Tensor drawn = empty({local() ? 1 : a_.samples, p_.rows});
    sample(a_.bias->view, drawn, local() ? kLocal : kWeight);
    Tensor mean = in_type(a_.bias->mu);
    const T *of_draw = data<T>(drawn), *of_mean = data<T>(mean);
    for_rows(rows_, p_.rows, [&](int64_t row) {
      T *to = first + row * p_.rows, *other = second + row * p_.rows;
      if (local())
        for (int64_t o = 0; o < p_.rows; ++o) to[o] += of_mean[o], other[o] += of_draw[o];
      else
        for (int64_t o = 0; o < p_.rows; ++o) to[o] += of_draw[row / batch_ * p_.rows + o];
    });
  }

  template <class T>
  void backward_in(const Tensor& grad_y, const KlGradient& grad_kl, bool need_x, const OptionalTensor& kept, LinearGradients& grads) {
    Tensor g = dense(grad_y.scalar_type() == type_ ? grad_y : torch::stable::to(grad_y, type_));
    g = reshaped(g, {a_.samples * batch_, p_.rows});
    Tensor h = empty({rows_, p_.rows}), z = second_input<T>();
    if (local()) {
      int64_t count = rows_ * p_.rows, parts = a_.samples * batch_ * p_.rows / (count > 0 ? count : 1);
      const T *all = data<T>(g), *factor = data<T>(*kept);
      if (parts > 1) g = empty({rows_, p_.rows});
      T *sum = data<T>(g), *other = data<T>(h);
      for_each(count, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) other[i] = all[i] * factor[i];
        if (parts > 1) std::copy(all + begin, all + end, sum + begin);
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t i = begin, j = part * count + begin; i < end; ++i, ++j) sum[i] += all[j], other[i] += all[j] * factor[j];
      });
    } else {
      signs_.copy<T>(data<T>(g), data<T>(h), p_.rows * per_example(), kOutputSigns);
    }
    Tensor input = input_, factor = input, grad_x;
    if (need_x && !local()) {
      factor = empty({rows_, p_.columns});
      signs_.copy<T>(nullptr, data<T>(factor), p_.columns * per_example(), kInputSigns);
    }
    if (fused()) {
      Tensor packed = pack_input(input, p_, rows_), packed_second = pack_input(z, p_, rows_);
      Tensor packed_factor = need_x && !local() ? pack_input(factor, p_, rows_) : packed;
      int64_t per_task = EstimatedBackward::rows_per_task(p_.rows), tasks = (p_.rows + per_task - 1) / per_task;
      Tensor parts = empty({need_x ? tasks : 0, packed.numel()});
      EstimatedBackward problem{p_, static_cast<int>(a_.divergence), estimator_, a_.samples, kernel_batch(), packed.const_data_ptr(),
                                packed_second.const_data_ptr(), packed_factor.const_data_ptr(), g.const_data_ptr(), h.const_data_ptr(),
                                need_x ? parts.mutable_data_ptr() : nullptr, grad_kl, grads.weight_mu.mutable_data_ptr(),
                                grads.weight_rho.mutable_data_ptr()};
      run(cpu_kernels().estimated_backward, problem, tasks, per_task * p_.columns);
      if (need_x) grad_x = summed<T>(parts, packed.size(2));
    } else {
      grad_x = multiplied_back<T>(input, z, factor, g, h, grad_kl, need_x, grads);
    }
    if (need_x)
      grads.x = reshaped(grad_x.scalar_type() == x_.scalar_type() ? grad_x : torch::stable::to(grad_x, x_.scalar_type()), shape_of(x_));
    if (a_.bias) bias_backward<T>(data<T>(g), data<T>(h), grad_kl, grads);
  }

  // The sum of packed parts, unpacked.
  template <class T> Tensor summed(const Tensor& parts, int64_t lanes) const {
    Tensor sum = empty({rows_, p_.columns});
    int64_t size = parts.size(1);
    for_each((p_.columns + lanes - 1) / lanes, 1 + kGrain / (rows_ * lanes * parts.size(0) + 1), [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v)
        for (int64_t b = 0; b < rows_; ++b) {
          T* to = data<T>(sum) + b * p_.columns + v * lanes;
          int64_t count = std::min(lanes, p_.columns - v * lanes);
          const T* from = data<T>(parts) + (v * rows_ + b) * lanes;
          std::fill(to, to + count, T(0));
          for (int64_t t = 0; t < parts.size(0); ++t, from += size)
            for (int64_t i = 0; i < count; ++i) to[i] += from[i];
        }
    });
    return sum;
  }

  // The backward by GEMMs. q, and then D, stand where the gradient of rho will be, M where that of mu will, if the types agree.
  template <class T>
  Tensor multiplied_back(const Tensor& input, const Tensor& z, const Tensor& factor, const Tensor& g, const Tensor& h,
                         const KlGradient& grad_kl, bool need_x, LinearGradients& grads) {
    bool in_place = type() == p_.type && second_shape(1).size() == 2;
    Tensor by_q;
    for_row_blocks(p_, local() ? 1 : a_.samples, [&](int64_t begin, int64_t count) {
      Posterior part = p_.slice(begin, count);
      bool whole = count == p_.rows;
      Tensor q = in_place && whole ? grads.weight_rho : empty(second_shape(count));
      Tensor m = in_place && whole ? grads.weight_mu : empty({count, p_.columns});
      Tensor g_part = columns_of(g, begin, count), h_part = by_sample(columns_of(h, begin, count));
      if (need_x) {
        bnn_fast::sample(part, kNone, a_.samples, q.mutable_data_ptr(), type(), estimator_);
        Tensor more = reshaped(product(h_part, q), {rows_, p_.columns});
        by_q = begin == 0 ? more : add(by_q, more);
      }
      aten("aten::mm", "out", torch::stable::transpose(g_part, 0, 1), input, m);
      aten(q.dim() == 2 ? "aten::mm" : "aten::bmm", "out", transposed(h_part), by_sample(z), q);
      int64_t offset = begin * p_.columns * size_of(p_.type);
      SampleBackward problem{part, static_cast<int>(a_.divergence), a_.samples, m.const_data_ptr(), type(), grad_kl,
                             data<char>(grads.weight_mu) + offset, data<char>(grads.weight_rho) + offset, estimator_,
                             q.const_data_ptr()};
      run_spans(cpu_kernels().sample_backward, problem);
    });
    if (!need_x) return by_q;
    Tensor grad_x = product(g, in_type(a_.weight.mu));
    T *to = data<T>(grad_x), *scale = data<T>(factor), *more = data<T>(by_q);
    for_each(rows_ * p_.columns, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] += scale[i] * more[i];
    });
    return grad_x;
  }

  template <class T> void bias_backward(const T* g, const T* h, const KlGradient& grad_kl, LinearGradients& grads) {
    int64_t parts = local() ? 1 : a_.samples;
    auto sums = [&](const T* from) { return sums_over_rows(from, parts, rows_ / parts, p_.rows); };
    std::vector<T> of_mean = sums(g), second = local() ? sums(h) : std::vector<T>();
    run_spans(cpu_kernels().sample_backward,
              SampleBackward{a_.bias->view, static_cast<int>(a_.divergence), a_.samples, of_mean.data(), type(), grad_kl,
                             grads.bias_mu->mutable_data_ptr(), grads.bias_rho->mutable_data_ptr(), local() ? kLocal : kWeight,
                             local() ? second.data() : nullptr});
  }

  const LinearArguments& a_;
  const Posterior& p_;
  const Tensor& x_;
  int estimator_;
  int64_t batch_, rows_;  // of one sample; that are computed, of all samples or of "local" one that is like the others
  int64_t examples_;      // of one sample
  ScalarType type_;
  Signs signs_;
  Tensor input_;
  double kl_ = 0;
};

}  // namespace bnn_fast
