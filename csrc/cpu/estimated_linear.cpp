// The variational linear layer by the estimators "local" and "flipout" on the CPU: operators, and the choice between the fused regime
// and that of the vendor's GEMMs. Formulas and kernels: estimators.h.
//
// Activations are computed in float32, or in double: squares and quotients would leave the range of 16 bits. They are seen as
// [samples, examples, everything else], and their noise as such too, from the row on that the key's third number says.
#include <algorithm>

#include "../layer.h"
#include "../philox.h"
#include "launch.h"

namespace bnn_fast {
namespace {

// Streams of the noise.
constexpr uint32_t kOutputNoise = 2, kInputSigns = 3, kOutputSigns = 4;

template <class T> T* data(const Tensor& t) { return static_cast<T*>(const_cast<void*>(t.const_data_ptr())); }

// body(i) for i in [0, count), on torch's threads.
template <class Body> void for_each(int64_t count, int64_t grain, Body body) {
  if (count <= grain) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

class Estimated {
 public:
  Estimated(const LinearArguments& a, const Tensor& x, const OptionalTensor& key, int64_t estimator)
      : a_(a), p_(a.weight.view), x_(x), estimator_(static_cast<int>(estimator)), batch_(a.check_input(x)),
        all_(a.samples * batch_), type_(compute_type(x.scalar_type())) {
    key_ = data<int64_t>(a.weight.key ? *a.weight.key : *key);
    examples_ = x.dim() > 1 ? x.size(0) / a.samples : 1;
    first_row_ = key->size(0) == 3 ? key_[2] : 0;
    input_ = dense(x.scalar_type() == type_ ? dense(x) : torch::stable::to(x, type_));
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

 private:
  // Fused saves passes over what is as large as the weights; the GEMMs have the better rate where there are many rows.
  bool fused() const { return all_ <= 64; }

  bool local() const { return estimator_ == kLocal; }
  Tensor empty(const Shape& shape) const { return empty_large(input_, shape, type_); }
  Type type() const { return type_ == ScalarType::Double ? Type::kFloat64 : Type::kFloat32; }

  // mu in the type computed in.
  Tensor in_type(const Tensor& mu) const { return dense_detached(mu.scalar_type() == type_ ? mu : torch::stable::to(mu, type_)); }

  void sample(const Posterior& p, Tensor& to, int estimator) {
    kl_ += bnn_fast::sample(p, a_.divergence, a_.samples, to.mutable_data_ptr(), type(), estimator);
  }

  // to = from with the signs of the stream; from null stands for ones. Signs are the bits of a counter's words, the lowest first.
  template <class T> void signed_copy(const T* from, T* to, int64_t columns, uint32_t stream) const {
    int64_t per_row = columns * (examples_ > 0 ? batch_ / examples_ : 0);
    auto seed = static_cast<uint64_t>(key_[0]);
    PhiloxRoundKeys keys({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    for_each(a_.samples * examples_, 1 + (1 << 15) / (per_row + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t c = 0; c < per_row; c += 128) {
          uint32_t words[1][4] = {{static_cast<uint32_t>(c / 128), static_cast<uint32_t>(first_row_ + row % examples_),
                                   static_cast<uint32_t>(key_[1] + row / examples_), stream}};
          philox(words, keys);
          int64_t stop = std::min(per_row, c + 128);
          for (int64_t i = c; i < stop; ++i) {
            T value = from ? from[row * per_row + i] : T(1);
            to[row * per_row + i] = words[0][(i - c) / 32] >> ((i - c) % 32) & 1 ? -value : value;
          }
        }
    });
  }

  // z of the formulas.
  template <class T> Tensor second_input() const {
    Tensor z = empty({all_, p_.columns});
    if (!local()) {
      signed_copy<T>(data<T>(input_), data<T>(z), p_.columns, kInputSigns);
      return z;
    }
    const T* from = data<T>(input_);
    for_each(all_ * p_.columns, 1 << 15, [&](int64_t begin, int64_t end) {
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
    return local() || a_.samples == 1 ? reshaped(t, {all_, t.size(-1)}) : reshaped(t, {a_.samples, batch_, t.size(-1)});
  }

  static Tensor columns_of(Tensor t, int64_t begin, int64_t count) {
    return count == t.size(1) ? t : dense(torch::stable::narrow(t, 1, begin, count));
  }

  static Tensor product(const Tensor& left, const Tensor& right) {
    return aten(right.dim() == 2 ? "aten::mm" : "aten::bmm", "", left, right);
  }

  template <class T> std::tuple<Tensor, Tensor, Tensor> forward_in() {
    Tensor z = second_input<T>(), first = empty({all_, p_.rows}), second = empty({all_, p_.rows});
    if (fused()) {
      Tensor packed = pack_input(input_, p_, all_), packed_second = pack_input(z, p_, all_);
      int64_t tasks = (p_.rows + kRowBlock - 1) / kRowBlock;
      std::vector<double> kl(a_.divergence == kNone ? 0 : tasks);
      EstimatedForward problem{p_, static_cast<int>(a_.divergence), estimator_, a_.samples, batch_, packed.const_data_ptr(),
                               packed_second.const_data_ptr(), first.mutable_data_ptr(), second.mutable_data_ptr(),
                               kl.empty() ? nullptr : kl.data()};
      run(cpu_kernels().estimated_forward, problem, tasks, kRowBlock * p_.columns);
      kl_ += sum_of(kl) / (a_.divergence == kSampled ? static_cast<double>(a_.samples) : 1.0);
    } else {
      first = product(reshaped(input_, {all_, p_.columns}), transposed(in_type(a_.weight.mu)));
      for_row_blocks(p_, local() ? 1 : a_.samples, [&](int64_t begin, int64_t count) {
        Tensor q = empty(second_shape(count));
        sample(p_.slice(begin, count), q, estimator_);
        Tensor part = product(by_sample(z), transposed(q));
        if (count == p_.rows) {
          second = part;
        } else {
          Tensor to = torch::stable::narrow(second, 1, begin, count);
          torch::stable::copy_(to, reshaped(part, {all_, count}));
        }
      });
    }
    Tensor y = empty_of(x_, a_.output_shape(x_), x_.scalar_type());
    Tensor kept = empty_of(x_, local() ? a_.output_shape(x_) : Shape{0}, type_);
    if (a_.bias) add_bias<T>(data<T>(first), data<T>(second));
    if (local()) {
      int64_t columns = p_.rows * (examples_ > 0 ? batch_ / examples_ : 0);
      Posterior outputs{examples_, columns, type(), first.const_data_ptr(), second.const_data_ptr(), kSoftplus, {0, 1, nullptr, nullptr},
                        key_, kOutputNoise, first_row_, 0};
      LocalOutputs problem{outputs, a_.samples, y.mutable_data_ptr(), type_of_tensor(y, "y"), kept.mutable_data_ptr()};
      run_spans(cpu_kernels().local_outputs, problem);
    } else {
      signed_copy<T>(data<T>(second), data<T>(second), p_.rows, kOutputSigns);
      T *sum = data<T>(first), *part = data<T>(second);
      for (int64_t i = 0; i < all_ * p_.rows; ++i) sum[i] += part[i];
      torch::stable::copy_(y, reshaped(first, a_.output_shape(x_)));
    }
    return {y, scalar_tensor(kl_, a_.weight.mu), kept};
  }

  // Of local its mean to the first and its variance to the second sums; of flipout a draw to the first.
  template <class T> void add_bias(T* first, T* second) {
    Tensor drawn = empty({local() ? 1 : a_.samples, p_.rows});
    sample(a_.bias->view, drawn, local() ? kLocal : kWeight);
    Tensor mean = in_type(a_.bias->mu);
    for (int64_t row = 0; row < all_; ++row)
      for (int64_t o = 0; o < p_.rows; ++o) {
        if (local()) second[row * p_.rows + o] += data<T>(drawn)[o];
        first[row * p_.rows + o] += local() ? data<T>(mean)[o] : data<T>(drawn)[row / batch_ * p_.rows + o];
      }
  }

  template <class T>
  void backward_in(const Tensor& grad_y, const KlGradient& grad_kl, bool need_x, const OptionalTensor& kept, LinearGradients& grads) {
    Tensor g = reshaped(dense(grad_y.scalar_type() == type_ ? dense(grad_y) : torch::stable::to(grad_y, type_)), {all_, p_.rows});
    Tensor h = empty({all_, p_.rows}), z = second_input<T>();
    if (local()) {
      for (int64_t i = 0; i < all_ * p_.rows; ++i) data<T>(h)[i] = data<T>(g)[i] * data<T>(*kept)[i];
    } else {
      signed_copy<T>(data<T>(g), data<T>(h), p_.rows, kOutputSigns);
    }
    Tensor input = reshaped(input_, {all_, p_.columns}), factor = input, grad_x;
    if (need_x && !local()) {
      factor = empty({all_, p_.columns});
      signed_copy<T>(nullptr, data<T>(factor), p_.columns, kInputSigns);
    }
    if (fused()) {
      if (need_x) grad_x = empty({all_, p_.columns});
      EstimatedBackward problem{p_, static_cast<int>(a_.divergence), estimator_, a_.samples, batch_, type(), input.const_data_ptr(),
                                z.const_data_ptr(), factor.const_data_ptr(), g.const_data_ptr(), h.const_data_ptr(),
                                need_x ? grad_x.mutable_data_ptr() : nullptr, grad_kl, grads.weight_mu.mutable_data_ptr(),
                                grads.weight_rho.mutable_data_ptr()};
      int64_t block = column_block(p_.columns), tasks = (p_.columns + block - 1) / block;
      run(cpu_kernels().estimated_backward, problem, tasks, block * p_.rows);
    } else {
      grad_x = multiplied_back<T>(input, z, factor, g, h, grad_kl, need_x, grads);
    }
    if (need_x)
      grads.x = reshaped(grad_x.scalar_type() == x_.scalar_type() ? grad_x : torch::stable::to(grad_x, x_.scalar_type()), shape_of(x_));
    if (a_.bias) bias_backward<T>(data<T>(g), data<T>(h), grad_kl, grads);
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
        Tensor more = reshaped(product(h_part, q), {all_, p_.columns});
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
    for_each(all_ * p_.columns, 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] += scale[i] * more[i];
    });
    return grad_x;
  }

  template <class T> void bias_backward(const T* g, const T* h, const KlGradient& grad_kl, LinearGradients& grads) {
    int64_t parts = local() ? 1 : a_.samples;
    auto sums = [&](const T* from) {
      std::vector<T> all(parts * p_.rows);
      std::vector<double> sum(p_.rows);
      for (int64_t s = 0; s < parts; ++s) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t b = 0; b < all_ / parts; ++b, from += p_.rows)
          for (int64_t o = 0; o < p_.rows; ++o) sum[o] += from[o];
        for (int64_t o = 0; o < p_.rows; ++o) all[s * p_.rows + o] = static_cast<T>(sum[o]);
      }
      return all;
    };
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
  int64_t batch_, all_;
  ScalarType type_;
  const int64_t* key_;
  int64_t examples_, first_row_;
  Tensor input_;
  double kl_ = 0;
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensors& posterior, const Tensor& key, const Tensors& prior,
                                           const Numbers& numbers, const Integers& options) {
  Options o = options_of(options, true);
  LinearArguments a(Lists(posterior, prior, numbers, true), key, o);
  return Estimated(a, x, key, o.estimator).forward();
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
    Estimated layer(a, *x, key, o.estimator);
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
