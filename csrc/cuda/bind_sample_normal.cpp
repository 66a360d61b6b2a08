// sample_normal and kl_normal on CUDA tensors. Operators: ../sample_normal.h. Kernels: sample_normal.cu.
#include "../sample_normal.h"
#include "sample_normal.h"
#include "stream.h"
#include "sum_values.h"

namespace bnn_fast {
namespace {

class Cuda {
 public:
  Cuda(const Tensor& like, const char* name) : on(like), name(name) {}
  Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) const {
    return empty_of(like, shape, dtype);
  }

  Tensor sample(const Posterior& p, int64_t divergence, int64_t samples, void* weight, Type type,
                const Tensor& like) const {
    SampleForward problem{p, static_cast<int>(divergence), samples, weight, type, nullptr};
    int64_t count = divergence == kNone ? 0 : bnn_fast_cuda_sample_forward_blocks(&problem);
    Tensor parts = empty_of(like, {count}, ScalarType::Double);
    if (count > 0) problem.kl = static_cast<double*>(parts.mutable_data_ptr());
    check_cuda(bnn_fast_cuda_sample_forward(&problem, on.stream()), name);
    Tensor sum = empty_of(like, {}, compute_type(like.scalar_type()));
    double factor = divergence == kSampled ? 1.0 / static_cast<double>(samples) : 1.0;
    Type sum_type = type_of_tensor(sum, "sum");
    check_cuda(bnn_fast_cuda_sum(problem.kl, count, factor, sum.mutable_data_ptr(), sum_type, on.stream()), name);
    return sum;
  }

  void backward(const SampleBackward& problem) const {
    check_cuda(bnn_fast_cuda_sample_backward(&problem, on.stream()), name);
  }
  void kl_elements(const KlElements& problem) const {
    check_cuda(bnn_fast_cuda_kl_elements(&problem, on.stream()), name);
  }

 private:
  OnDevice on;
  const char* name;
};

using Operators = SampleNormal<Cuda>;

}  // namespace
}  // namespace bnn_fast

BNN_FAST_IMPLEMENT(BNN_FAST_LIBRARY, BNN_FAST_CUDA_KEY, m) {
  m.impl("_sample_normal", TORCH_BOX(&bnn_fast::Operators::forward));
  m.impl("_sample_normal_backward", TORCH_BOX(&bnn_fast::Operators::backward));
  m.impl("_kl_normal", TORCH_BOX(&bnn_fast::Operators::divergence));
  m.impl("_kl_normal_backward", TORCH_BOX(&bnn_fast::Operators::divergence_backward));
}
