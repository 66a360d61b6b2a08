// Launchers of sample_normal.cu and factors.cu: raw pointers, sizes and a stream; no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace bnn_fast {

extern "C" {

// How many doubles problem->kl must hold: its sum's parts, which bnn_fast_cuda_sum (sum_values.h) adds.
int64_t bnn_fast_cuda_sample_forward_blocks(const SampleForward* problem);

cudaError_t bnn_fast_cuda_sample_forward(const SampleForward* problem, void* stream);
cudaError_t bnn_fast_cuda_sample_backward(const SampleBackward* problem, void* stream);
cudaError_t bnn_fast_cuda_kl_elements(const KlElements* problem, void* stream);

// f(e) of a posterior's normals, which has one row and neither mu nor rho.
cudaError_t bnn_fast_cuda_factors(const Posterior* normals, void* factors, void* stream);

}

}  // namespace bnn_fast
