// The estimators "local" and "flipout" on CUDA tensors: the choice between the fused regime and that of the vendor's GEMMs,
// workspaces, launches. Formulas: ../cpu/estimators.h. Operators: ../estimated.h.
//
// Everything is computed in float32, or in double: squares and quotients would leave the range of 16 bits. With f = x and r = kept of
// local, or signs f = s and r of flipout, z = x f and h = g r, in either regime.
#include "../estimated.h"
#include "estimated.h"
#include "sample_normal.h"
#include "stream.h"
#include "sum_values.h"

namespace bnn_fast {
namespace {

class Estimated {
 public:
  Estimated(const LinearArguments& a, const Tensor& x, int64_t estimator, bool may_share)
      : device_(a.weight.mu), a_(a), p_(a.weight.view), x_(x), estimator_(static_cast<int>(estimator)), batch_(a.check_input(x)),
        shared_(may_share && local() && a.shared(x)), rows_(shared_ ? batch_ : a.samples * batch_),
        examples_(x.dim() > 1 ? x.size(0) / a.samples : 1), type_(compute_type(x.scalar_type())) {
    Tensor rows = detached(x);
    input_ = reshaped(in_type(shared_ ? a.own_rows(rows) : rows), {rows_, p_.columns});
  }

  static Tensor empty_like(const Tensor& t) { return empty_of(t, shape_of(t), t.scalar_type()); }
  static void sample_backward(const LinearArguments& a, const SampleBackward& problem) {
    check_cuda(bnn_fast_cuda_sample_backward(&problem, OnDevice(a.weight.mu).stream()), kBackward);
  }

  std::tuple<Tensor, Tensor, Tensor> forward() {
    Tensor z = local() ? times(input_, input_) : with_signs(&input_, shape_of(input_), kInputSigns);
    fused() ? fused_forward(z) : multiplied(z);
    Tensor mean, drawn;
    if (a_.bias) {
      drawn = empty({local() ? 1 : a_.samples, p_.rows});
      sample(a_.bias->view, drawn, local() ? kLocal : kWeight, a_.divergence);
      mean = local() ? in_type(detached(a_.bias->mu)) : drawn;
    }
    Tensor y = empty_of(x_, a_.output_shape(x_), x_.scalar_type());
    Tensor kept = empty_of(x_, local() ? a_.output_shape(x_) : Shape{0}, type_);
    auto at = [&](const Tensor& t) { return a_.bias ? t.const_data_ptr() : nullptr; };
    EstimatedOutputs problem{estimator_, a_.samples, examples_, p_.rows * per_example(), p_.rows, batch_, shared_, type(),
                             first_.const_data_ptr(), second_.const_data_ptr(), places_.parts, places_.part_stride, places_.row_stride,
                             places_.output_stride, at(mean), at(drawn), p_.key, key_has_row(), y.mutable_data_ptr(),
                             type_of_tensor(y, "y"), kept.mutable_data_ptr()};
    check_cuda(bnn_fast_cuda_estimated_outputs(&problem, device_.stream()), kForward);
    return {y, kl(), kept};
  }

  void backward(const Tensor& grad_y, const KlGradient& grad_kl, bool need_x, const OptionalTensor& kept, LinearGradients& grads) {
    Tensor g = reshaped(in_type(detached(grad_y)), {a_.samples * batch_, p_.rows});
    Tensor h = local() ? times(g, reshaped(*kept, shape_of(g))) : with_signs(&g, shape_of(g), kOutputSigns);
    if (shared_) g = sum_of_samples(g), h = sum_of_samples(h);
    Tensor f = local() ? input_ : with_signs(nullptr, {rows_, p_.columns}, kInputSigns), z = times(input_, f);
    Tensor grad_x = fused() ? fused_backward(z, f, g, h, grad_kl, need_x, grads) : multiplied_back(z, f, g, h, grad_kl, need_x, grads);
    if (need_x)
      grads.x = reshaped(grad_x.scalar_type() == x_.scalar_type() ? grad_x : torch::stable::to(grad_x, x_.scalar_type()), shape_of(x_));
    if (!a_.bias) return;
    Tensor of_mean = local() ? torch::stable::sum(g, Shape{0}) : sum_of_batch(g), second;
    if (local()) second = torch::stable::sum(h, Shape{0});
    put_together(a_.bias->view, local() ? kLocal : kWeight, of_mean, local() ? &second : nullptr, grad_kl,
                 grads.bias_mu->mutable_data_ptr(), grads.bias_rho->mutable_data_ptr());
  }

 private:
  static constexpr const char *kForward = "_estimated_linear", *kBackward = "_estimated_linear_backward";

  // Two products with one pass over mu and rho, as many rows as have their sums in registers. A sampled KL draws weights, whatever
  // the estimator; flipout with several draws would need the products of each apart. Not yet measured.
  bool fused() const {
    return type_ == ScalarType::Float && rows_ > 0 && rows_ <= kEstimatedBatch && p_.rows > 0 && p_.columns > 0 &&
           a_.divergence != kSampled && (local() || a_.samples == 1);
  }

  bool local() const { return estimator_ == kLocal; }
  bool key_has_row() const { return a_.weight.key->size(0) == 3; }
  int64_t per_example() const { return examples_ > 0 ? batch_ / examples_ : 0; }
  Type type() const { return type_ == ScalarType::Double ? Type::kFloat64 : Type::kFloat32; }
  Tensor empty(const Shape& shape) const { return empty_of(x_, shape, type_); }

  static Tensor times(const Tensor& left, const Tensor& right) { return aten("aten::mul", "Tensor", left, right); }
  static Tensor product(const Tensor& left, const Tensor& right) {
    return aten(right.dim() == 2 ? "aten::mm" : "aten::bmm", "", left, right);
  }
  static Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, t.dim() - 2, t.dim() - 1); }
  static float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

  Tensor in_type(const Tensor& t) const { return dense(t.scalar_type() == type_ ? t : torch::stable::to(t, type_)); }

  // The sums of a [samples * batch, outputs] over samples, or over the batch.
  Tensor sum_of_samples(const Tensor& t) const { return torch::stable::sum(reshaped(t, {a_.samples, batch_, p_.rows}), Shape{0}); }
  Tensor sum_of_batch(const Tensor& t) const { return torch::stable::sum(reshaped(t, {a_.samples, batch_, p_.rows}), Shape{1}); }

  // from, or ones, with flipout's signs.
  Tensor with_signs(const Tensor* from, const Shape& shape, uint32_t stream) const {
    Tensor to = empty(shape);
    Signs problem{a_.samples, examples_, shape[1] * per_example(), type(), from ? from->const_data_ptr() : nullptr,
                  to.mutable_data_ptr(), p_.key, key_has_row(), stream};
    check_cuda(bnn_fast_cuda_signs(&problem, device_.stream()), kForward);
    return to;
  }

  // Draws what an estimator draws of a posterior (problem.h); adds to the KL.
  void sample(const Posterior& p, const Tensor& to, int estimator, int64_t divergence) {
    SampleForward problem{p, static_cast<int>(divergence), a_.samples, to.mutable_data_ptr(), type(), nullptr, estimator};
    if (divergence != kNone) problem.kl = kl_parts(bnn_fast_cuda_sample_forward_blocks(&problem));
    check_cuda(bnn_fast_cuda_sample_forward(&problem, device_.stream()), kForward);
  }

  static int64_t kl_parts_of(const Posterior& p) {
    SampleForward pass{};
    pass.posterior = p;
    return bnn_fast_cuda_sample_forward_blocks(&pass);
  }

  // Makes room for the parts of the KL: so many of the weights, and the bias's.
  void reserve_kl(int64_t of_weights) {
    int64_t count = a_.divergence == kNone ? 0 : of_weights + (a_.bias ? kl_parts_of(a_.bias->view) : 0);
    kl_parts_ = empty_of(x_, {count}, ScalarType::Double);
  }
  double* kl_parts(int64_t count) {
    kl_used_ += count;
    return static_cast<double*>(kl_parts_.mutable_data_ptr()) + kl_used_ - count;
  }
  Tensor kl() const {
    Tensor sum = empty_of(x_, {}, compute_type(a_.weight.mu.scalar_type()));
    double factor = a_.divergence == kSampled ? 1.0 / static_cast<double>(a_.samples) : 1.0;
    check_cuda(bnn_fast_cuda_sum(static_cast<const double*>(kl_parts_.const_data_ptr()), kl_used_, factor, sum.mutable_data_ptr(),
                                 type_of_tensor(sum, "kl"), device_.stream()), kForward);
    return sum;
  }

  void put_together(const Posterior& p, int estimator, const Tensor& first, const Tensor* second, const KlGradient& grad_kl, void* grad_mu,
                    void* grad_rho) const {
    SampleBackward problem{p, static_cast<int>(a_.divergence), a_.samples, first.const_data_ptr(), type(), grad_kl, grad_mu, grad_rho,
                           estimator, second ? second->const_data_ptr() : nullptr};
    check_cuda(bnn_fast_cuda_sample_backward(&problem, device_.stream()), kBackward);
  }

  // Both products, to `first` and `second`.
  void fused_forward(const Tensor& z) {
    TwoProducts problem{p_, static_cast<int>(a_.divergence), estimator_, rows_, floats(input_), floats(z), nullptr, nullptr};
    EstimatedParts parts = bnn_fast_cuda_estimated_forward_parts(&problem);
    int64_t padded = padded_batch(rows_), size = p_.rows * padded;
    reserve_kl(parts.kls);
    first_ = empty({parts.parts, 2, size});
    problem.sums = floats(first_), problem.kl = kl_parts(a_.divergence == kNone ? 0 : parts.kls);
    check_cuda(bnn_fast_cuda_estimated_forward(&problem, device_.stream()), kForward);
    second_ = torch::stable::narrow(first_, 1, 1, 1);
    places_ = {parts.parts, 2 * size, 1, padded};
  }

  void multiplied(const Tensor& z) {
    int64_t draws = local() ? 1 : a_.samples, count_of_parts = 0;
    for_row_blocks(p_, draws, [&](int64_t begin, int64_t count) { count_of_parts += kl_parts_of(p_.slice(begin, count)); });
    reserve_kl(count_of_parts);
    first_ = dense(product(input_, transposed(in_type(detached(a_.weight.mu)))));
    second_ = empty({rows_, p_.rows});
    for_row_blocks(p_, draws, [&](int64_t begin, int64_t count) {
      Tensor q = empty(second_shape(count)), to = torch::stable::narrow(second_, 1, begin, count);
      sample(p_.slice(begin, count), q, estimator_, a_.divergence);
      torch::stable::copy_(to, reshaped(product(by_sample(z), transposed(q)), {rows_, count}));
    });
    places_ = {1, 0, p_.rows, 1};
  }

  // q of the formulas for some rows of the weights: [samples, rows, in], of local [rows, in].
  Shape second_shape(int64_t rows) const {
    return local() || a_.samples == 1 ? Shape{rows, p_.columns} : Shape{a_.samples, rows, p_.columns};
  }
  // [samples, batch, columns] of what is multiplied by q.
  Tensor by_sample(const Tensor& t) const {
    return local() || a_.samples == 1 ? t : reshaped(t, {a_.samples, batch_, t.size(-1)});
  }

  Tensor fused_backward(const Tensor& z, const Tensor& f, const Tensor& g, const Tensor& h, const KlGradient& grad_kl, bool need_x,
                        LinearGradients& grads) {
    TwoGradients problem{p_, static_cast<int>(a_.divergence), estimator_, rows_, floats(input_), floats(z), floats(f), floats(g),
                         floats(h), grad_kl, nullptr, grads.weight_mu.mutable_data_ptr(), grads.weight_rho.mutable_data_ptr()};
    Tensor parts = empty({need_x ? bnn_fast_cuda_estimated_backward_parts(&problem) : 0, rows_, p_.columns});
    if (need_x) problem.grad_x = floats(parts);
    check_cuda(bnn_fast_cuda_estimated_backward(&problem, device_.stream()), kBackward);
    return parts.size(0) > 1 ? torch::stable::sum(parts, Shape{0}) : parts;
  }

  // q, and then D, stand where the gradient of rho will be, M where that of mu will, if the types agree.
  Tensor multiplied_back(const Tensor& z, const Tensor& f, Tensor g, Tensor h, const KlGradient& grad_kl, bool need_x,
                         LinearGradients& grads) {
    bool in_place = type() == p_.type && second_shape(1).size() == 2;
    Tensor by_q;
    for_row_blocks(p_, local() ? 1 : a_.samples, [&](int64_t begin, int64_t count) {
      Posterior part = p_.slice(begin, count);
      bool whole = in_place && count == p_.rows;
      Tensor q = whole ? grads.weight_rho : empty(second_shape(count)), m = whole ? grads.weight_mu : empty({count, p_.columns});
      Tensor g_part = torch::stable::narrow(g, 1, begin, count), h_part = by_sample(torch::stable::narrow(h, 1, begin, count));
      if (need_x) {
        sample(part, q, estimator_, kNone);
        Tensor more = reshaped(product(h_part, q), {rows_, p_.columns});
        by_q = begin == 0 ? more : add(by_q, more);
      }
      aten("aten::mm", "out", transposed(g_part), input_, m);
      aten(q.dim() == 2 ? "aten::mm" : "aten::bmm", "out", transposed(h_part), by_sample(z), q);
      auto from = [&](const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()) + begin * p_.columns * size_of(p_.type); };
      put_together(part, estimator_, m, &q, grad_kl, from(grads.weight_mu), from(grads.weight_rho));
    });
    if (!need_x) return by_q;
    Tensor by_mu = product(g, in_type(detached(a_.weight.mu)));
    return p_.rows > 0 ? add(by_mu, times(f, by_q)) : by_mu;
  }

  const OnDevice device_;
  const LinearArguments& a_;
  const Posterior& p_;
  const Tensor& x_;
  int estimator_;
  int64_t batch_;      // of one sample
  bool shared_;        // whether all samples have the same products
  int64_t rows_;       // that are computed
  int64_t examples_;   // of one sample
  ScalarType type_;
  Tensor input_;       // [rows, in]
  Tensor first_, second_, kl_parts_;
  struct { int64_t parts, part_stride, row_stride, output_stride; } places_;  // of the products (estimated.h)
  int64_t kl_used_ = 0;
};

}  // namespace
}  // namespace bnn_fast

BNN_FAST_IMPLEMENT(BNN_FAST_LIBRARY, BNN_FAST_CUDA_KEY, m) {
  m.impl("_estimated_linear", TORCH_BOX(&bnn_fast::estimated_linear<bnn_fast::Estimated>));
  m.impl("_estimated_linear_backward", TORCH_BOX(&bnn_fast::estimated_linear_backward<bnn_fast::Estimated>));
}
