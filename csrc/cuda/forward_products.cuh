// The products of the forward kernels (linear_forward.cu, estimated_forward.cu): of a warp's 16 outputs with up to kBatch rows of x,
// which is staged in shared memory; by fused multiply-adds in float32, on the tensor cores for 16-bit types.
#pragma once

#include "tile.cuh"

namespace bnn_fast {
namespace {

constexpr int kStage = 64;  // inputs of x that are staged at a time

// A stage's row: padded where lanes that read eight rows at once would fall on the same banks.
template <Type type> constexpr int kStageStride = type == Type::kFloat32 ? kStage : kStage + 16;

// The products of a warp's 16 outputs with up to kBatch rows of x.
template <Type type, int kBatch> struct Products;

template <int kBatch> struct Products<Type::kFloat32, kBatch> {
  float sums[2][kBatch] = {};

  __device__ void multiply(const float (&w)[2][4], const float* x, const Place& at) {
    BNN_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      float4 input = *reinterpret_cast<const float4*>(x + b * kStageStride<Type::kFloat32> + 4 * at.t);
      BNN_UNROLL
      for (int h = 0; h < 2; ++h) {
        sums[h][b] = fma_lane(w[h][0], input.x, sums[h][b]);
        sums[h][b] = fma_lane(w[h][1], input.y, sums[h][b]);
        sums[h][b] = fma_lane(w[h][2], input.z, sums[h][b]);
        sums[h][b] = fma_lane(w[h][3], input.w, sums[h][b]);
      }
    }
  }

  // Calls write(h, b, sum) for output g + 8 h and row b of x, once in the warp for each.
  template <class Write> __device__ void finish(const Place& at, Write write) {
    BNN_UNROLL
    for (int b = 0; b < kBatch; ++b)
      BNN_UNROLL
      for (int h = 0; h < 2; ++h) {
        float sum = sums[h][b];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (at.t == b % 4) write(h, b, sum);
      }
  }
};

template <Type type, int kBatch> struct Products {
  float sums[kBatch / 8][4] = {};

  __device__ void multiply(const float (&w)[2][4], const uint16_t* x, const Place& at) {
    uint32_t a0 = pack_halves(type, w[0][0], w[0][1]), a2 = pack_halves(type, w[0][2], w[0][3]);
    uint32_t a1 = pack_halves(type, w[1][0], w[1][1]), a3 = pack_halves(type, w[1][2], w[1][3]);
    BNN_UNROLL
    for (int n = 0; n < kBatch / 8; ++n) {
      uint2 input = *reinterpret_cast<const uint2*>(x + (8 * n + at.g) * kStageStride<type> + 4 * at.t);
      multiply_accumulate<type>(sums[n], a0, a1, a2, a3, input.x, input.y);
    }
  }

  template <class Write> __device__ void finish(const Place& at, Write write) {
    BNN_UNROLL
    for (int n = 0; n < kBatch / 8; ++n)
      BNN_UNROLL
      for (int i = 0; i < 4; ++i) write(i / 2, 8 * n + 2 * at.t + i % 2, sums[n][i]);
  }
};

}  // namespace
}  // namespace bnn_fast
