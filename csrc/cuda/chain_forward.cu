// A chain of narrow layers, forward, in one launch behind that of its weights:
//
//   a_0 = x,   a_(l+1) = act_l(W_l a_l + b_l),   y the last
//
// A block has a tile of one sample's rows in shared memory and takes it through all layers. The first one also adds up the KL.
#include "chain_products.cuh"

namespace bnn_fast {
namespace {

template <Type type> __global__ void __launch_bounds__(kThreads, 2)
    chain_forward_kernel(const __grid_constant__ ChainForwardPass pass, const __grid_constant__ ChainTiling tiling) {
  extern __shared__ uint4 shared[];
  if (blockIdx.x == 0 && pass.kl) {
    double sum = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < pass.part_count; i += kThreads) sum += pass.parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *pass.kl = static_cast<float>(sum * pass.factor);
  }
  if (pass.batch == 0) return;
  auto tiles = static_cast<unsigned>(tiling.tiles);
  int64_t sample = blockIdx.x / tiles, first = static_cast<int64_t>(blockIdx.x % tiles) * tiling.rows, left = pass.batch - first;
  auto* memory = reinterpret_cast<Stored<type>*>(shared);
  ChainRows<type> a{memory, tiling.rows, tiling.stride(type), left < tiling.rows ? static_cast<int>(left) : tiling.rows};
  Stored<type>* slice = memory + tiling.elements(type);
  int inputs = static_cast<int>(pass.layers[0].inputs), outputs = inputs;
  int64_t row = pass.shared ? first : sample * pass.batch + first;
  a.read(static_cast<const Stored<type>*>(pass.x) + row * inputs, inputs);
  for (int l = 0; l < pass.count; ++l) {
    const ChainLayer& layer = pass.layers[l];
    a.fill(outputs, layer.bias != nullptr);
    multiply_layer<type, false>(ChainWeights<type>(layer, sample), a, slice);
    outputs = static_cast<int>(layer.outputs);
    if (layer.activation == kNoActivation) continue;
    a.activate_all(layer, nullptr);
  }
  __syncthreads();
  a.write(static_cast<Stored<type>*>(pass.y) + (sample * pass.batch + first) * outputs, outputs);
}

template <Type type> cudaError_t launch(const ChainForwardPass& pass, cudaStream_t stream) {
  ChainTiling tiling(pass);
  int64_t blocks = pass.samples * tiling.tiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  size_t bytes = (tiling.elements(type) + kSlice<type>) * sizeof(Stored<type>);
  chain_forward_kernel<type><<<blocks < 1 ? 1 : static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(pass, tiling);
  return cudaGetLastError();
}

}  // namespace

extern "C" cudaError_t bnn_fast_cuda_chain_forward(const ChainForwardPass* pass, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  return pass->type == Type::kFloat32    ? launch<Type::kFloat32>(*pass, queue)
         : pass->type == Type::kBFloat16 ? launch<Type::kBFloat16>(*pass, queue)
                                         : launch<Type::kFloat16>(*pass, queue);
}

}  // namespace bnn_fast
