// Launchers of sample_rows.cu: raw pointers, sizes and a stream; no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../rows.h"

namespace bnn_fast {

extern "C" {

// How many doubles problem->kl must hold: its sum's parts, which bnn_fast_cuda_sum adds.
int64_t bnn_fast_cuda_rows_blocks(const RowsForward* problem);

cudaError_t bnn_fast_cuda_rows_forward(const RowsForward* problem, void* stream);
cudaError_t bnn_fast_cuda_rows_backward(const RowsBackward* problem, void* stream);

}

}  // namespace bnn_fast
