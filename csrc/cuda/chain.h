// The CUDA kernels of a chain of narrow layers as the operators see them: problems and launchers. No torch here.
//
//   chain_draw.cu       the weights of all its layers and samples, with their KL
//   chain_forward.cu    all layers
//   chain_backward.cu   all layers back, and the gradients put together: two launches
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace bnn_fast {

constexpr int64_t kChainSide = 128;  // the widest layer that these kernels take
constexpr int kChainTensors = 2 * static_cast<int>(kChainLayers);

// A chain's weight or bias, small enough for all of them to go with a launch: a posterior whose noise begins at row 0 and column 0, or
// a tensor that is not drawn, and then it is mu.
struct ChainTensor {
  const void *mu, *rho;   // [rows, columns]; rho is null of one that is not drawn
  double loc, scale;      // the prior's
  const void *loc_tensor, *scale_tensor;
  const int64_t* key;
  uint32_t stream;
  int32_t rows, columns;
  int32_t quads, elements;  // of the tensors before it, the elements in one sample
  void *grad_mu, *grad_rho;
};

struct ChainTensors {
  ChainTensor at[kChainTensors];
  int32_t count, quads, elements;
  int scale;
  Type type;  // of all of them and of the activations: float32 or one of 16 bits

  void add(const Posterior& p, void* grad_mu, void* grad_rho) {
    at[count++] = {p.mu,     p.rho, p.prior.loc, p.prior.scale, p.prior.loc_tensor, p.prior.scale_tensor, p.key, p.stream,
                   static_cast<int32_t>(p.rows), static_cast<int32_t>(p.columns), quads, elements, grad_mu, grad_rho};
    quads += static_cast<int32_t>(p.rows * ((p.columns + 3) / 4));
    elements += static_cast<int32_t>(p.rows * p.columns);
  }
};

struct ChainDraw {
  ChainTensors tensors;    // of those that are drawn
  int divergence;
  int64_t first, samples;  // those from `first` on are drawn
  void* weights;           // tensor after tensor, each [samples, rows, columns]
  double* kl;              // [blocks] or null: each block's part
};

struct ChainPass {
  ChainLayer layers[kChainLayers];
  int count;
  int64_t samples, batch;  // batch: of one sample
  bool shared;             // all samples have the same x
  Type type;               // of x, the weights and all else that is kept in memory
  const void* x;           // [samples, batch, inputs] or [batch, inputs]
};

struct ChainForwardPass : ChainPass {
  void* y;  // [samples, batch, outputs]
  // Of the KL, null where another launch writes it: factor times the sum of these parts.
  float* kl;
  const double* parts;
  int64_t part_count;
  double factor;
};

struct ChainBackwardPass : ChainPass {
  const void* grad_y;  // [samples, batch, outputs]; with no batch there are the KL's gradients alone
  void* grad_x;        // [samples, batch, inputs] or null
  void* workspace;
};

struct ChainGradients {
  ChainTensors tensors;  // of the layers in their order, whether they are drawn or not
  int divergence;
  int64_t samples;
  KlGradient grad_kl;
};

extern "C" {

int64_t bnn_fast_cuda_chain_draw_blocks(const ChainDraw*);
cudaError_t bnn_fast_cuda_chain_draw(const ChainDraw*, void* stream);

cudaError_t bnn_fast_cuda_chain_forward(const ChainForwardPass*, void* stream);

// How many bytes of workspace.
int64_t bnn_fast_cuda_chain_backward_workspace(const ChainBackwardPass*);
cudaError_t bnn_fast_cuda_chain_backward(const ChainBackwardPass*, const ChainGradients*, void* stream);

}

}  // namespace bnn_fast
