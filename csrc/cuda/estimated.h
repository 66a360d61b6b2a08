// The kernels of the estimators "local" and "flipout" on CUDA (formulas: ../cpu/estimators.h): problems and launchers. No torch here.
//
//   estimated_forward.cu, estimated_backward.cu    small batches: two products at a time in one pass over mu and rho
//   estimated_outputs.cu                           what is done to activations: flipout's signs, outputs put together
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace bnn_fast {

// x mu^T and z q^T of at most kEstimatedBatch rows, and the KL of the weights, which is not the sampled one.
struct TwoProducts {
  Posterior weight;
  int divergence, estimator;
  int64_t batch;   // all rows of x
  const float* x;  // [batch, columns]
  const float* z;  // [batch, columns]
  float* sums;     // [parts, 2, rows, padded_batch(batch)]: the parts of both products
  double* kl;      // [kls]: the parts of the KL
};

// M = g^T x and D = h^T z, the gradients of mu and rho that come of them, and dx = g mu + f (h q).
struct TwoGradients {
  Posterior weight;
  int divergence, estimator;
  int64_t batch;
  const float *x, *z, *f;  // [batch, columns]
  const float *g, *h;      // [batch, rows]
  KlGradient grad_kl;      // one number
  float* grad_x;           // [parts, batch, columns], or null
  void* grad_mu;           // [rows, columns], the posterior's type
  void* grad_rho;
};

struct EstimatedParts {
  int64_t parts, kls;
};

// y = m + sqrt(v) eps, kept = eps / sqrt(v), 0 where v is; or of flipout y = first + r second. Activations are seen as
// [samples, examples, columns].
struct EstimatedOutputs {
  int estimator;
  int64_t samples, examples, columns, outputs;  // columns: a multiple of outputs
  int64_t batch;        // of one sample, examples * columns / outputs
  bool shared;          // all samples have the same products
  Type type;            // computed in
  const void* first;    // parts of [samples or 1, batch, outputs], of these strides in elements
  const void* second;
  int64_t parts, part_stride, row_stride, output_stride;
  const void* bias;           // [samples, outputs]; of local, the mean [outputs]; or null
  const void* bias_variance;  // [outputs], of local
  const int64_t* key;
  bool key_has_row;  // its third number is the first example's
  void* y;
  Type y_type;
  void* kept;  // of local
};

// to = from, or ones where that is null, with flipout's signs.
struct Signs {
  int64_t samples, examples, columns;
  Type type;
  const void* from;  // [samples, examples, columns], or null
  void* to;
  const int64_t* key;
  bool key_has_row;
  uint32_t stream;
};

// What the fused kernels take, and of those that they are made for the fewest rows that hold a batch.
constexpr int64_t kEstimatedBatch = 16;
inline int64_t padded_batch(int64_t batch) { return batch == 1 ? 1 : batch <= 4 ? 4 : kEstimatedBatch; }

extern "C" {

EstimatedParts bnn_fast_cuda_estimated_forward_parts(const TwoProducts*);
cudaError_t bnn_fast_cuda_estimated_forward(const TwoProducts*, void* stream);
int64_t bnn_fast_cuda_estimated_backward_parts(const TwoGradients*);
cudaError_t bnn_fast_cuda_estimated_backward(const TwoGradients*, void* stream);
cudaError_t bnn_fast_cuda_estimated_outputs(const EstimatedOutputs*, void* stream);
cudaError_t bnn_fast_cuda_signs(const Signs*, void* stream);

}

}  // namespace bnn_fast
