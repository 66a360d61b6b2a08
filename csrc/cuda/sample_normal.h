// Launchers of sample_normal.cu: raw pointers, sizes and a stream; no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace bnn_fast {

extern "C" {

// How many doubles problem->kl must hold: its sum's parts, which bnn_fast_cuda_sum adds.
int64_t bnn_fast_cuda_sample_forward_blocks(const SampleForward* problem);

cudaError_t bnn_fast_cuda_sample_forward(const SampleForward* problem, void* stream);
cudaError_t bnn_fast_cuda_sample_backward(const SampleBackward* problem, void* stream);
cudaError_t bnn_fast_cuda_kl_elements(const KlElements* problem, void* stream);

// out = factor * the sum of the parts, 0 if there are none: one float, or double if that is the type.
cudaError_t bnn_fast_cuda_sum(const double* parts, int64_t count, double factor, void* out, Type type,
                              void* stream);

}

}  // namespace bnn_fast
