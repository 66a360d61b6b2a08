// The weights of all layers of a chain, drawn for all samples in one launch, with their KL.
//
//   w_s = mu + sigma(rho) eps_s
//
// A thread has one quad of parameters, of whichever tensor, and every n-th sample of it. Each block leaves its part of the KL, which
// the chain's own launch adds.
#include "chain.cuh"

namespace bnn_fast {
namespace {

constexpr unsigned kDrawThreads = 128, kDrawBlocks = 8 * 132;  // some waves on an H200

dim3 grid_of(const ChainDraw& problem) {
  unsigned across = (static_cast<unsigned>(problem.tensors.quads) + kDrawThreads - 1) / kDrawThreads;
  int64_t down = across > 0 && across < kDrawBlocks ? kDrawBlocks / across : 1;
  return dim3(across, static_cast<unsigned>(down < problem.samples ? down : problem.samples));
}

__global__ void __launch_bounds__(kDrawThreads) chain_draw_kernel(const __grid_constant__ ChainDraw problem) {
  const ChainTensors& tensors = problem.tensors;
  int i = static_cast<int>(blockIdx.x * kDrawThreads + threadIdx.x);
  double kl = 0;
  if (i < tensors.quads) {
    ChainQuad at(tensors, i);
    const ChainTensor& tensor = at.tensor;
    Posterior p = posterior_of(tensor, tensors);
    Quad quad = quad_at(p, at.row, at.counter);
    QuadNoise noise(p);
    float mu[4], rho[4], sigma[4];
    load_quad<float>(p.mu, p.type, quad, 0.0f, mu);
    load_quad<float>(p.rho, p.type, quad, 0.0f, rho);
    with_scale(p.scale, [&]<int scale>() {
      for (int k = 0; k < 4; ++k) sigma[k] = spread<scale>(rho[k]).sigma;
    });
    int64_t size = static_cast<int64_t>(tensor.rows) * tensor.columns;
    Quad to = quad;
    to.index += problem.samples * tensor.elements + blockIdx.y * size;
    for (int64_t s = blockIdx.y; s < problem.samples; s += gridDim.y, to.index += gridDim.y * size) {
      float w[4];
      noise.normals<float>(problem.first + s, at.row, at.counter, w);
      for (int k = 0; k < 4; ++k) w[k] = fma_lane(sigma[k], w[k], mu[k]);
      store_quad<float>(problem.weights, tensors.type, to, w);
    }
    if (problem.divergence == kSampled || blockIdx.y == 0)
      kl = quad_divergence<float>(p, problem.divergence, at.row, at.counter, problem.first + blockIdx.y,
                                  problem.first + problem.samples, gridDim.y);
  }
  if (!problem.kl) return;
  kl = block_sum(kl);
  if (threadIdx.x == 0) problem.kl[blockIdx.y * gridDim.x + blockIdx.x] = kl;
}

}  // namespace

extern "C" int64_t bnn_fast_cuda_chain_draw_blocks(const ChainDraw* problem) {
  dim3 grid = grid_of(*problem);
  return static_cast<int64_t>(grid.x) * grid.y;
}

extern "C" cudaError_t bnn_fast_cuda_chain_draw(const ChainDraw* problem, void* stream) {
  dim3 grid = grid_of(*problem);
  if (grid.x == 0) return cudaSuccess;
  chain_draw_kernel<<<grid, kDrawThreads, 0, static_cast<cudaStream_t>(stream)>>>(*problem);
  return cudaGetLastError();
}

}  // namespace bnn_fast
