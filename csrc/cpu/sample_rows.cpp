// sample_rows on the CPU. Operators: ../sample_rows.h. Kernels: rows.h.
#include "../sample_rows.h"
#include "launch.h"

namespace bnn_fast {
namespace {

struct Cpu {
  static constexpr bool keeps_rows = false, adds = true;

  Cpu(const Tensor&, const char*) {}
  Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) const { return empty_large(like, shape, dtype); }

  bool keeps(int64_t elements) const { return elements <= kKept; }

  void check(const LookUp& at) const {
    for (int64_t i = 0; i < at.count; ++i)
      STD_TORCH_CHECK(at.rows[i] >= 0 && at.rows[i] < at.table, "rows has row number ", at.rows[i], ", expected 0 to ", at.table - 1);
  }

  Tensor forward(RowsForward problem, const Tensor& like) const {
    Tasks tasks(looked_up(problem.posterior, problem.at));
    std::vector<double> kl(problem.divergence == kNone ? 0 : tasks.count);
    problem.kl = kl.empty() ? nullptr : kl.data();
    run(cpu_kernels().rows_forward, problem, tasks.count, Tasks::kElements);
    return problem.divergence == kNone ? empty_of(like, {0}, compute_type(like.scalar_type())) : scalar_tensor(sum_of(kl), like);
  }

  void backward(const RowsBackward& problem) const {
    run(cpu_kernels().rows_backward, problem, Tasks(looked_up(problem.posterior, problem.at)).count, Tasks::kElements);
  }

  void added(const RowsAdded& problem) const {
    int64_t per_task = problem.rows_per_task(), tasks = per_task > 0 ? (problem.at.table + per_task - 1) / per_task : 0;
    run(cpu_kernels().rows_added, problem, tasks, per_task * problem.columns);
  }
};

using Operators = SampleRows<Cpu>;

}  // namespace
}  // namespace bnn_fast

STABLE_TORCH_LIBRARY_IMPL(bnn_fast, CPU, m) {
  m.impl("_sample_rows", TORCH_BOX(&bnn_fast::Operators::forward));
  m.impl("_sample_rows_backward", TORCH_BOX(&bnn_fast::Operators::backward));
}
