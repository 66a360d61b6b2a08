// sample_rows on CUDA tensors. Operators: ../sample_rows.h. Kernels: sample_rows.cu.
#include "../sample_rows.h"
#include "sample_rows.h"
#include "stream.h"
#include "sum_values.h"

namespace bnn_fast {
namespace {

class Cuda {
 public:
  static constexpr bool keeps_rows = true, adds = false;

  Cuda(const Tensor& like, const char* name) : on(like), name(name) {}
  Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) const { return empty_of(like, shape, dtype); }
  bool keeps(int64_t) const { return false; }
  void check(const LookUp&) const {}  // the host does not see the numbers; the kernels look

  Tensor forward(RowsForward problem, const Tensor& like) const {
    bool with_kl = problem.divergence != kNone;
    int64_t count = with_kl ? bnn_fast_cuda_rows_blocks(&problem) : 0;
    Tensor parts = empty_of(like, {count}, ScalarType::Double);
    if (count > 0) problem.kl = static_cast<double*>(parts.mutable_data_ptr());
    check_cuda(bnn_fast_cuda_rows_forward(&problem, on.stream()), name);
    Tensor sum = empty_of(like, with_kl ? Shape{} : Shape{0}, compute_type(like.scalar_type()));
    if (with_kl)
      check_cuda(bnn_fast_cuda_sum(problem.kl, count, 1.0, sum.mutable_data_ptr(), type_of_tensor(sum, "sum"), on.stream()), name);
    return sum;
  }

  void added(const RowsAdded&) const {}
  void backward(const RowsBackward& problem) const { check_cuda(bnn_fast_cuda_rows_backward(&problem, on.stream()), name); }

 private:
  OnDevice on;
  const char* name;
};

using Operators = SampleRows<Cuda>;

}  // namespace
}  // namespace bnn_fast

BNN_FAST_IMPLEMENT(BNN_FAST_LIBRARY, BNN_FAST_CUDA_KEY, m) {
  m.impl("_sample_rows", TORCH_BOX(&bnn_fast::Operators::forward));
  m.impl("_sample_rows_backward", TORCH_BOX(&bnn_fast::Operators::backward));
}
