// The variational linear layer's fused CUDA kernels as the operators see them: problems and launchers. No torch here.
//
//   small_linear_forward.cu, small_linear_backward.cu    layers of at most kSmallSide x kSmallSide weights, any batch
//   linear_forward.cu, linear_backward.cu    small batches
//
// A launcher cuts its workspace itself; *_workspace tells how many bytes it needs on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace bnn_fast {

struct LayerForward {
  Posterior weight;  // rows: outputs, columns: inputs
  Posterior bias;    // one row of outputs; mu is null where there is none
  int divergence;
  int64_t samples, batch;  // batch: of one sample
  const void* x;  // [samples * batch, columns]
  Type x_type;    // of x and y
  void* y;        // [samples * batch, rows]
  void* kl;       // one number: float, double if the posterior is stored so. Not null.
  void* workspace;
};

struct LayerBackward {
  Posterior weight, bias;
  int divergence;
  int64_t samples, batch;
  const void* x;       // [samples * batch, columns]
  const void* grad_y;  // [samples * batch, rows]
  Type x_type;         // of x, grad_y and grad_x
  KlGradient grad_kl;  // one number
  void* grad_x;        // [samples * batch, columns], or null
  void* grad_mu;       // [rows, columns], the posterior's type
  void* grad_rho;
  void* grad_bias_mu;  // [rows], or null without a bias
  void* grad_bias_rho;
  void* workspace;
};

constexpr int64_t kSmallSide = 64;

// What the fused kernels take: batches of up to kFusedBatch, of up to kFusedBatchHalf if x is of 16 bits and there is one
// sample; up to kFusedSamples samples.
constexpr int64_t kFusedBatch = 16, kFusedBatchHalf = 64, kFusedSamples = 8;

extern "C" {

int64_t bnn_fast_cuda_small_forward_workspace(const LayerForward*);
cudaError_t bnn_fast_cuda_small_forward(const LayerForward*, void* stream);
int64_t bnn_fast_cuda_small_backward_workspace(const LayerBackward*);
cudaError_t bnn_fast_cuda_small_backward(const LayerBackward*, void* stream);

int64_t bnn_fast_cuda_linear_forward_workspace(const LayerForward*);
cudaError_t bnn_fast_cuda_linear_forward(const LayerForward*, void* stream);
int64_t bnn_fast_cuda_linear_backward_workspace(const LayerBackward*);
cudaError_t bnn_fast_cuda_linear_backward(const LayerBackward*, void* stream);

}

}  // namespace bnn_fast
