// Launchers of sum_values.cu: raw pointers and a stream; no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace bnn_fast {

// out = the sum of the numbers that values point to, each a float, or a double if that is the type.
extern "C" cudaError_t bnn_fast_cuda_sum_values(const void* const* values, int64_t count, Type type, void* out, void* stream);

// out = factor * the sum of the parts, 0 if there are none: one float, or double if that is the type.
extern "C" cudaError_t bnn_fast_cuda_sum(const double* parts, int64_t count, double factor, void* out, Type type,
                                         void* stream);

}  // namespace bnn_fast
