// The operators of the variational linear layer by the estimators "local" and "flipout" on the CPU.
#include "estimated.h"

STABLE_TORCH_LIBRARY_IMPL(bnn_fast, CPU, m) {
  m.impl("_estimated_linear", TORCH_BOX(&bnn_fast::estimated_linear<bnn_fast::Estimated>));
  m.impl("_estimated_linear_backward", TORCH_BOX(&bnn_fast::estimated_linear_backward<bnn_fast::Estimated>));
}
