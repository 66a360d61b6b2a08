// A variational linear layer of at most 64 x 64 weights, forward, in one launch:
//
//   y_s[b, o] = sum_i x_s[b, i] w_s[o, i] + bias_s[o],   w_s = mu + sigma(rho) eps_s
//   kl = sum_oi KL + sum_o KL
//
// Such a layer is bound by launches and latency, not by bytes. The first block computes the KL. Every other
// one draws all the weights of its sample into shared memory and multiplies its part of the batch, tile by
// tile; a tile is read while the weights are drawn, or the tile before it is multiplied.
#include "small_linear.cuh"

namespace bnn_fast {
namespace {

// The whole layer's KL. Several threads share the samples of a quad where there are more threads than quads.
template <class F> __device__ void write_kl(const LayerForward& problem, const LayerQuads& quads) {
  bool sampled = problem.divergence == kSampled;
  int copies = sampled && quads.count < kSmallThreads ? kSmallThreads / quads.count : 1;
  int items = problem.divergence == kNone ? 0 : quads.count * copies;
  double sum = 0;
  for (int i = threadIdx.x; i < items; i += kSmallThreads) {
    LayerQuad at(problem.weight, problem.bias, quads, i % quads.count);
    sum += quad_divergence<F>(at.posterior, problem.divergence, at.row, at.counter, i / quads.count, problem.samples, copies);
  }
  sum = block_sum(sum);
  if (sampled) sum /= static_cast<double>(problem.samples);
  if (threadIdx.x == 0) *static_cast<F*>(problem.kl) = static_cast<F>(sum);
}

template <class F>
__global__ void __launch_bounds__(kSmallThreads, sizeof(F) == 4 ? 2 : 1)
    small_forward_kernel(LayerForward problem, LayerQuads quads, Tiling tiling) {
  if (blockIdx.x == 0) return write_kl<F>(problem, quads);
  extern __shared__ double2 shared[];
  int outputs = static_cast<int>(problem.weight.rows), inputs = static_cast<int>(problem.weight.columns);
  int rows = tiling.rows, stride = row_stride(inputs);
  F* x = reinterpret_cast<F*>(shared);  // [rows, inputs]
  F* weight = x + rows * stride;        // [outputs, inputs]
  F* bias = weight + outputs * stride;  // [outputs]
  int64_t sample = (blockIdx.x - 1) / tiling.chunks, tile = (blockIdx.x - 1) % tiling.chunks;

  RowsAhead<F> ahead;
  ahead.fetch(problem.x, problem.x_type, inputs, tiling, sample, tile);
  for (int i = threadIdx.x; i < rows * stride + outputs * (stride + 1); i += kSmallThreads) x[i] = 0;
  __syncthreads();
  draw_layer<F>(problem.weight, problem.bias, quads, quads.count, sample, problem.x_type, weight, stride,
                1, bias);
  for (; tile < tiling.tiles; tile += tiling.chunks) {
    ahead.put(x, rows, inputs, stride);
    __syncthreads();
    ahead.fetch(problem.x, problem.x_type, inputs, tiling, sample, tile + tiling.chunks);
    int64_t first = tile * rows, inside = tiling.batch - first;
    first = (sample * tiling.batch + first) * outputs;
    multiply(x, weight, rows, outputs, inputs, [&](int b, int o, F sum) {
      if (b < inside) store_element<F>(problem.y, problem.x_type, first + b * outputs + o, sum + bias[o]);
    });
    __syncthreads();
  }
}

template <class F> cudaError_t launch(const LayerForward& problem, cudaStream_t stream) {
  LayerQuads quads(problem.weight, problem.bias);
  int outputs = static_cast<int>(problem.weight.rows), inputs = static_cast<int>(problem.weight.columns);
  int stride = row_stride(inputs), fixed = outputs * (stride + 1);
  Tiling tiling = make_tiling(problem.batch, problem.samples, inputs, fixed, stride, sizeof(F));
  int64_t blocks = problem.samples * tiling.chunks + 1;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  size_t shared = (fixed + tiling.rows * stride) * sizeof(F);
  auto grid = static_cast<unsigned>(blocks);
  small_forward_kernel<F><<<grid, kSmallThreads, shared, stream>>>(problem, quads, tiling);
  return cudaGetLastError();
}

}  // namespace

extern "C" int64_t bnn_fast_cuda_small_forward_workspace(const LayerForward*) { return 0; }

extern "C" cudaError_t bnn_fast_cuda_small_forward(const LayerForward* problem, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  auto launch_type = problem->weight.type == Type::kFloat64 ? launch<double> : launch<float>;
  return launch_type(*problem, queue);
}

}  // namespace bnn_fast
