// Launchers of sample_normal.cu: raw pointers, sizes and a stream; no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace bnn_fast {

// How many doubles problem->kl must hold.
extern "C" int64_t bnn_fast_cuda_sample_normal_blocks(const SampleForward* problem);

// float32 only. kl: one float, 0 without a divergence.
extern "C" cudaError_t bnn_fast_cuda_sample_normal(const SampleForward* problem, float* kl, void* stream);

}  // namespace bnn_fast
