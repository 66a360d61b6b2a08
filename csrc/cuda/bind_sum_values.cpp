// sum_values on CUDA tensors. Operator: ../sum_values.h. Kernel: sum_values.cu.
#include "../sum_values.h"
#include "stream.h"
#include "sum_values.h"

namespace bnn_fast {
namespace {

struct CudaSum {
  static void sum(const void* const* values, int64_t count, Type type, void* out, const Tensor& like) {
    OnDevice on(like);
    check_cuda(bnn_fast_cuda_sum_values(values, count, type, out, on.stream()), "_sum_values");
  }
};

}  // namespace
}  // namespace bnn_fast

BNN_FAST_IMPLEMENT(BNN_FAST_LIBRARY, BNN_FAST_CUDA_KEY, m) {
  m.impl("_sum_values", TORCH_BOX(&bnn_fast::sum_values<bnn_fast::CudaSum>));
}
