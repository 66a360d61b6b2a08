// sum_values on the CPU. Operator: ../sum_values.h.
#include "../sum_values.h"

namespace bnn_fast {
namespace {

template <class T> void sum(const void* const* values, int64_t count, void* out) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += *static_cast<const T*>(values[i]);
  *static_cast<T*>(out) = static_cast<T>(total);
}

struct CpuSum {
  static void sum(const void* const* values, int64_t count, Type type, void* out, const Tensor&) {
    (type == Type::kFloat64 ? bnn_fast::sum<double> : bnn_fast::sum<float>)(values, count, out);
  }
};

}  // namespace
}  // namespace bnn_fast

STABLE_TORCH_LIBRARY_IMPL(bnn_fast, CPU, m) { m.impl("_sum_values", TORCH_BOX(&bnn_fast::sum_values<bnn_fast::CpuSum>)); }
