// The products of the backward kernels (linear_backward.cu, estimated_backward.cu), of one tile of 16 outputs x 16 inputs and one sample:
//
//   dW = g^T x, where the tile's quads are, and dx += g w
//
// in float32 by fused multiply-adds: each lane sums dx for four inputs and every eighth row, reading the drawn tile from shared
// memory; for 16-bit types on the tensor cores.
#pragma once

#include "tile.cuh"

namespace bnn_fast {
namespace {

constexpr int kStage = 2 * kSide;  // outputs of g that are staged at a time

// Padded for ldmatrix: eight rows of 16 bytes, each on banks of its own.
template <Type type> constexpr int kStageStride = type == Type::kFloat32 ? kStage : kStage + 8;

// Where column c of a tile's 16 lies in a row of x in shared memory. For the tensor cores: as the inputs are numbered (tile.cuh).
template <Type type> __device__ __forceinline__ int place_in_row(int c) {
  return type == Type::kFloat32 ? c : c / 2 % 2 * 8 + c / 4 * 2 + c % 2;
}

// A matrix of activations [samples * batch, columns], of which a block holds some columns in shared memory for all its steps:
// [members][kBatch] rows of `stride`, zero outside.
template <Type type, int kBatch>
__device__ __forceinline__ void load_inputs(const Stored<type>* from, int members, int64_t samples, int64_t batch, int64_t columns,
                                            int64_t first_column, int inputs, int stride, Stored<type>* to) {
  for (int i = threadIdx.x; i < members * kBatch * inputs; i += kThreads) {
    int row = i / inputs, c = i % inputs, sample = row / kBatch, b = row % kBatch;
    int64_t column = first_column + c;
    bool inside = sample < samples && b < batch && column >= 0 && column < columns;
    to[row * stride + c / kSide * kSide + place_in_row<type>(c % kSide)] =
        inside ? from[(sample * batch + b) * columns + column] : Stored<type>(0);
  }
}

// A warp's products with up to kBatch rows: dW of a tile, and dx of 16 inputs summed over all tiles.
//   x        [kBatch] rows of 16 inputs       g  [kBatch] rows of 16 outputs
//   scratch  of the warp, one float4 for each quad
template <Type type, int kBatch> struct Products;

template <int kBatch> struct Products<Type::kFloat32, kBatch> {
  static constexpr int kRows = (kBatch + 7) / 8, kStride = kStageStride<Type::kFloat32>;
  float grad_x[kRows][4] = {};  // row g + 8 i, inputs 4 t to 4 t + 3

  // dW of a tile
  __device__ void outer(const float* x, int x_stride, const float* g, const Place& at, float (&grad_w)[2][4]) {
    BNN_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      float input[4];
      unpack(*reinterpret_cast<const float4*>(x + b * x_stride + 4 * at.t), input);
      float low = g[b * kStride + at.g], high = g[b * kStride + at.g + 8];
      BNN_UNROLL
      for (int k = 0; k < 4; ++k) {
        grad_w[0][k] = fma_lane(low, input[k], grad_w[0][k]);
        grad_w[1][k] = fma_lane(high, input[k], grad_w[1][k]);
      }
    }
  }

  // dx, of a tile in shared memory. Of one row of x every lane takes its own quads, and gather() adds these up.
  __device__ void back(const float4* w, const float* g, const Place& at) {
    if constexpr (kBatch == 1) {
      BNN_UNROLL
      for (int h = 0; h < 2; ++h) {
        float row[4], output = g[at.g + h * 8];
        unpack(w[h * 32 + at.lane], row);
        BNN_UNROLL
        for (int k = 0; k < 4; ++k) grad_x[0][k] = fma_lane(output, row[k], grad_x[0][k]);
      }
    } else {
      BNN_UNROLL
      for (int o = 0; o < kSide; o += 4) {
        float rows[4][4];
        BNN_UNROLL
        for (int j = 0; j < 4; ++j) unpack(w[(o + j) * 4 + at.t], rows[j]);
        BNN_UNROLL
        for (int i = 0; i < kRows; ++i) {
          float outputs[4];
          unpack(*reinterpret_cast<const float4*>(g + min(at.g + 8 * i, kBatch - 1) * kStride + o), outputs);
          BNN_UNROLL
          for (int j = 0; j < 4; ++j)
            BNN_UNROLL
            for (int k = 0; k < 4; ++k) grad_x[i][k] = fma_lane(outputs[j], rows[j][k], grad_x[i][k]);
        }
      }
    }
  }

  // Once, behind all tiles.
  __device__ void gather() {
    if constexpr (kBatch == 1) {
      BNN_UNROLL
      for (int k = 0; k < 4; ++k)
        BNN_UNROLL
        for (int lanes = 4; lanes < 32; lanes *= 2) grad_x[0][k] += __shfl_xor_sync(kAllLanes, grad_x[0][k], lanes);
    }
  }

  __device__ void multiply(const float (&w)[2][4], const float* x, int x_stride, const float* g, float4* scratch, const Place& at,
                           float (&grad_w)[2][4]) {
    scratch[at.lane] = pack(w[0]);
    scratch[32 + at.lane] = pack(w[1]);
    outer(x, x_stride, g, at, grad_w);
    __syncwarp();
    back(scratch, g, at);
    __syncwarp();
  }

  // Calls write(b, sums) for row b of dx at this lane's four inputs, once in the warp for each.
  template <class Write> __device__ void finish(const Place& at, Write write) {
    BNN_UNROLL
    for (int i = 0; i < kRows; ++i) write(at.g + 8 * i, grad_x[i]);
  }
};

// On the tensor cores. Of dW the right factor is x, of dx the drawn tile, rounded and transposed.
template <Type type, int kBatch> struct Products {
  static constexpr int kBlocks = kBatch / 16;
  float grad_x[kBlocks][2][4] = {};

  // Four 8 x 8 matrices, lane l giving row l % 8 of matrix l / 8.
  template <bool transposed> __device__ static void load_matrices(const uint16_t* row, uint32_t (&m)[4]) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (transposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                   : "r"(address)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                   : "r"(address)
                   : "memory");
  }

  __device__ static uint32_t transpose(uint32_t matrix) {
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(matrix));
    return out;
  }

  __device__ void multiply(const float (&w)[2][4], const uint16_t* x, int x_stride, const uint16_t* g, float4*, const Place& at,
                           float (&grad_w)[2][4]) {
    uint32_t right[2][2];  // inputs 4 t + {2 n, 2 n + 1}, outputs 8 h to 8 h + 7
    float products[2][4] = {};
    BNN_UNROLL
    for (int n = 0; n < 2; ++n)
      BNN_UNROLL
      for (int h = 0; h < 2; ++h) right[n][h] = transpose(pack_halves(type, w[h][2 * n], w[h][2 * n + 1]));
    int row = at.lane % 8, low = at.lane / 8 % 2 * 8, high = at.lane / 16 * 8;
    BNN_UNROLL
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t m[4], inputs[4];
      load_matrices<true>(x + (16 * block + low + row) * x_stride + high, inputs);
      load_matrices<true>(g + (16 * block + high + row) * kStageStride<type> + low, m);
      multiply_accumulate<type>(products[0], m[0], m[1], m[2], m[3], inputs[0], inputs[1]);
      multiply_accumulate<type>(products[1], m[0], m[1], m[2], m[3], inputs[2], inputs[3]);
      load_matrices<false>(g + (16 * block + low + row) * kStageStride<type> + high, m);
      multiply_accumulate<type>(grad_x[block][0], m[0], m[1], m[2], m[3], right[0][0], right[0][1]);
      multiply_accumulate<type>(grad_x[block][1], m[0], m[1], m[2], m[3], right[1][0], right[1][1]);
    }
    BNN_UNROLL
    for (int h = 0; h < 2; ++h)
      BNN_UNROLL
      for (int k = 0; k < 4; ++k) grad_w[h][k] += products[k / 2][2 * h + k % 2];
  }

  template <class Write> __device__ void finish(const Place& at, Write write) {
    BNN_UNROLL
    for (int block = 0; block < kBlocks; ++block)
      BNN_UNROLL
      for (int h = 0; h < 2; ++h) {
        float sums[4];
        BNN_UNROLL
        for (int k = 0; k < 4; ++k) sums[k] = grad_x[block][k / 2][2 * h + k % 2];
        write(16 * block + 8 * h + at.g, sums);
      }
  }
};

}  // namespace
}  // namespace bnn_fast
