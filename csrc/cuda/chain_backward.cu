// A chain of narrow layers, backward, in two launches:
//
//   g = dL/dz_l = dL/da_(l+1) act_l'(z_l),   dL/da_l = W_l^T g,   dW_l = sum over rows of g a_l^T,   db_l = sum of g
//   dmu = sum_s dW_s + k dKL/dmu,   drho = sigma' sum_s dW_s eps_s + k dKL/drho
//
// First, a block walks its part of a sample's rows, tile by tile. It runs the forward of a tile again, which leaves every z_l in memory of the
// block's own, and goes back through the layers; its sums of all dW grow in memory. Second, a warp for each quad of
// parameters adds these parts in a fixed order and puts the gradients together (quad_gradient.cuh).
#include "chain_products.cuh"
#include "quad_gradient.cuh"

namespace bnn_fast {
namespace {

constexpr int64_t kPartBlocks = 264;  // at most, over a sample's rows: two on each processor of an H200

// How a pass and its memory are cut, from the shape alone.
struct ChainPlan : ChainTiling {
  int chunks;                   // of a sample's tiles: a block each
  int weights;                  // of a sample, with the biases
  int64_t outputs;              // of all layers
  int64_t part_bytes, z_bytes;  // of all blocks

  explicit ChainPlan(const ChainBackwardPass& pass) : ChainTiling(pass), weights(0), outputs(0) {
    for (int l = 0; l < pass.count; ++l) {
      weights += static_cast<int>(pass.layers[l].parameters());
      outputs += pass.layers[l].outputs;
    }
    int64_t most = pass.samples < kPartBlocks ? kPartBlocks / pass.samples : 1;
    chunks = static_cast<int>(tiles < most ? tiles : most);
    part_bytes = (blocks(pass) * weights * 4 + 15) / 16 * 16;
    z_bytes = blocks(pass) * outputs * rows * size_of(pass.type);
  }
  int64_t blocks(const ChainPass& pass) const { return pass.samples * chunks; }
};

template <Type type> __global__ void __launch_bounds__(kThreads, 2)
    chain_parts_kernel(const __grid_constant__ ChainBackwardPass pass, const __grid_constant__ ChainPlan plan) {
  extern __shared__ uint4 shared[];
  auto chunks = static_cast<unsigned>(plan.chunks);
  int64_t sample = blockIdx.x / chunks;
  int stride = plan.stride(type), rows = plan.rows;
  auto* memory = reinterpret_cast<Stored<type>*>(shared);
  ChainRows<type> a{memory, rows, stride, 0}, g{memory + plan.elements(type), rows, stride, 0};
  Stored<type>* slice = memory + 2 * plan.elements(type);
  float* part = static_cast<float*>(pass.workspace) + static_cast<int64_t>(blockIdx.x) * plan.weights;
  auto* z = reinterpret_cast<Stored<type>*>(static_cast<char*>(pass.workspace) + plan.part_bytes) + blockIdx.x * plan.outputs * rows;
  int inputs = static_cast<int>(pass.layers[0].inputs);
  const ChainLayer& last = pass.layers[pass.count - 1];

  bool begins = true;
  for (int64_t tile = blockIdx.x % chunks; tile < plan.tiles; tile += chunks, begins = false) {
    int64_t first = tile * rows, left = pass.batch - first, row = sample * pass.batch + first;
    a.inside = g.inside = left < rows ? static_cast<int>(left) : rows;
    auto* x = static_cast<const Stored<type>*>(pass.x) + (pass.shared ? first : row) * inputs;
    __syncthreads();  // those that are still with the tile before
    a.read(x, inputs);
    int features = inputs;
    Stored<type>* kept = z;
    for (int l = 0; l < pass.count; ++l) {
      const ChainLayer& layer = pass.layers[l];
      a.fill(features, layer.bias != nullptr);
      multiply_layer<type, false>(ChainWeights<type>(layer, sample), a, slice);
      features = static_cast<int>(layer.outputs);
      a.activate_all(layer, kept);
      kept += layer.outputs * rows;
    }

    g.read(static_cast<const Stored<type>*>(pass.grad_y) + row * last.outputs, features);
    __syncthreads();
    float* part_end = part + plan.weights;
    for (int l = pass.count - 1; l >= 0; --l) {
      const ChainLayer& layer = pass.layers[l];
      ChainWeights<type> w(layer, sample);
      kept -= layer.outputs * rows;
      g.multiply_slopes(layer, kept);
      g.fill(w.outputs, false);
      if (l > 0)
        a.activate_kept(pass.layers[l - 1], kept - static_cast<int64_t>(w.inputs) * rows);
      else
        a.read(x, w.inputs);
      a.fill(w.inputs, w.bias != nullptr);
      __syncthreads();
      part_end -= w.outputs * w.columns();
      for_weight_sums(g, a, w.outputs, w.columns(), [&](int o, int k, float sum) {
        float* to = part_end + (k < w.inputs ? o * w.inputs + k : w.outputs * w.inputs + o);
        *to = begins ? sum : *to + sum;
      });
      if (l > 0 || pass.grad_x) multiply_layer<type, true>(w, g, slice);
    }
    if (pass.grad_x) g.write(static_cast<Stored<type>*>(pass.grad_x) + row * inputs, inputs);
  }
}

// A warp for each quad of the tensors. lanes: those that share a sample's parts, a power of two.
__global__ void __launch_bounds__(32, 8)
    chain_gradient_kernel(const __grid_constant__ ChainGradients problem, const float* parts, int chunks, int weights, int lanes) {
  ChainQuad at(problem.tensors, static_cast<int>(blockIdx.x));
  const ChainTensor& tensor = at.tensor;
  Posterior p = posterior_of(tensor, problem.tensors);
  Quad quad = quad_at(p, at.row, at.counter);
  auto add_parts = [&](int64_t s, int chunk, float (&gradient)[4]) {
    const float* from = parts + (s * chunks + chunk) * weights + tensor.elements + quad.index;
    for (int k = 0; k < 4; ++k)
      if (quad.inside(k)) gradient[k] += from[k];
  };
  float by_mu[4] = {}, by_rho[4] = {};
  if (tensor.rho) {
    warp_gradient<float>(p, problem.divergence, problem.grad_kl, at.row, at.counter, problem.samples, chunks, lanes, add_parts, by_mu,
                         by_rho);
  } else {
    for_parts<float>(problem.samples, chunks, lanes, add_parts, [&](int64_t, const float (&gradient)[4]) {
      for (int k = 0; k < 4; ++k) by_mu[k] += gradient[k];
    });
    sum_lanes(by_mu);
  }
  if (threadIdx.x > 0) return;
  store_quad<float>(tensor.grad_mu, p.type, quad, by_mu);
  if (tensor.rho) store_quad<float>(tensor.grad_rho, p.type, quad, by_rho);
}

template <Type type> cudaError_t launch_parts(const ChainBackwardPass& pass, const ChainPlan& plan, cudaStream_t stream) {
  if (plan.blocks(pass) > INT32_MAX) return cudaErrorInvalidConfiguration;
  size_t bytes = (2 * plan.elements(type) + kSlice<type>) * sizeof(Stored<type>);
  chain_parts_kernel<type><<<static_cast<unsigned>(plan.blocks(pass)), kThreads, bytes, stream>>>(pass, plan);
  return cudaGetLastError();
}

}  // namespace

extern "C" int64_t bnn_fast_cuda_chain_backward_workspace(const ChainBackwardPass* pass) {
  ChainPlan plan(*pass);
  return plan.part_bytes + plan.z_bytes;
}

extern "C" cudaError_t bnn_fast_cuda_chain_backward(const ChainBackwardPass* pass, const ChainGradients* gradients, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  ChainPlan plan(*pass);
  if (plan.chunks > 0) {
    auto launch = pass->type == Type::kFloat32    ? launch_parts<Type::kFloat32>
                  : pass->type == Type::kBFloat16 ? launch_parts<Type::kBFloat16>
                                                  : launch_parts<Type::kFloat16>;
    if (cudaError_t error = launch(*pass, plan, queue)) return error;
  }
  if (gradients->tensors.quads == 0) return cudaSuccess;
  int lanes = 1;
  while (lanes < plan.chunks && lanes < 32) lanes *= 2;
  chain_gradient_kernel<<<gradients->tensors.quads, 32, 0, queue>>>(*gradients, static_cast<const float*>(pass->workspace), plan.chunks,
                                                                    plan.weights, lanes);
  return cudaGetLastError();
}

}  // namespace bnn_fast
