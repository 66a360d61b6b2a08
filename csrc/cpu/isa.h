// The kernel table of one instruction set: included by isa_*.cpp after BNN_FAST_ISA and the compiler's target are set.
// float32 and the half types run on the lane type F, float64 on single doubles.
#pragma once

#include "chain_backward.h"
#include "estimators.h"
#include "factorised_linear.h"
#include "linear.h"
#include "narrow.h"
#include "rows.h"

BNN_FAST_BEGIN

template <class Problem, void (*narrow)(const Problem&, int64_t, int64_t), void (*wide)(const Problem&, int64_t, int64_t)>
void by_type(const Problem& problem, int64_t begin, int64_t end) {
  bool is_wide;
  if constexpr (requires { problem.wide; })
    is_wide = problem.wide;
  else if constexpr (requires { problem.weight.type; })
    is_wide = problem.weight.type == Type::kFloat64;
  else if constexpr (requires { problem.type; })
    is_wide = problem.type == Type::kFloat64;
  else
    is_wide = problem.posterior.type == Type::kFloat64;
  (is_wide ? wide : narrow)(problem, begin, end);
}

template <class F> constexpr CpuKernels make_kernels(const char* name) {
  return {name,
          Lane<F>::width,
          by_type<SampleForward, sample_forward<F>, sample_forward<double>>,
          by_type<SampleBackward, sample_backward<F>, sample_backward<double>>,
          by_type<RowsForward, rows_forward<F>, rows_forward<double>>,
          by_type<RowsBackward, rows_backward<F>, rows_backward<double>>,
          by_type<RowsAdded, rows_added<float>, rows_added<double>>,
          by_type<KlElements, kl_elements<F>, kl_elements<double>>,
          by_type<Pack, pack_vectors<F>, pack_vectors<double>>,
          by_type<LinearForward, linear_forward<F>, linear_forward<double>>,
          by_type<LinearBackward, linear_backward<F>, linear_backward<double>>,
          by_type<EstimatedForward, estimated_forward<F>, estimated_forward<double>>,
          by_type<EstimatedBackward, estimated_backward<F>, estimated_backward<double>>,
          by_type<LocalOutputs, local_outputs<F>, local_outputs<double>>,
          by_type<ChainForward, chain_forward<F>, chain_forward<double>>,
          by_type<ChainBackward, chain_backward<F>, chain_backward<double>>,
          Lane<F>::width > 1 ? narrow_forward<F> : nullptr,
          Lane<F>::width > 1 ? narrow_backward<F> : nullptr};
}

BNN_FAST_END
