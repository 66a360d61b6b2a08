// The products of a chain's layer with a tile of rows in shared memory (chain.cuh), [features][rows]:
//
//   forward    Z[o][b] = sum_k W[o][k] A[k][b]
//   backward   dA[k][b] = sum_o W[o][k] G[o][b]     dW[o][k] = sum_b G[o][b] A[k][b]
//
// Of Z and dA a block has all sums at once: in float32 a thread has four features of four rows; of 16-bit types a warp has four tiles
// of 16 features and 8 rows, in the tensor cores. Their weights are staged in slices of the index that is summed. Parts of dW
// need no staging: both factors are in shared memory.
#pragma once

#include "chain.cuh"

namespace bnn_fast {

// Elements of the slice of weights in shared memory.
template <Type type> constexpr int kSlice = type == Type::kFloat32 ? 2048 : 5120;

// sum_k M[m][k] A[k][b] for `outer` features m and all rows b of a tile, where M is W, [o][k], or its transposed.
template <Type type> struct ChainProducts;

template <> struct ChainProducts<Type::kFloat32> {
  static constexpr Type type = Type::kFloat32;
  float sums[4][4] = {};
  int outer, row, feature;  // the first of the thread's rows and of its features

  __device__ ChainProducts(int outer, int rows)
      : outer(outer), row(threadIdx.x % (rows / 4) * 4), feature(threadIdx.x / (rows / 4) * 4) {}

  // A slice is [depth][outer], with rows of whole quads.
  __device__ int width() const { return outer > 0 ? (outer + 3) / 4 * 4 : 4; }
  __device__ int depth() const { return kSlice<type> / width(); }
  __device__ int place(int m, int k, int) const { return k * width() + m; }

  __device__ void multiply(const float* slice, int depth, const ChainRows<type>& a, int first) {
    if (feature >= outer) return;
    const float *m = slice + feature, *inputs = a.of(first, row);
#pragma unroll 2
    for (int k = 0; k < depth; ++k, m += width(), inputs += a.stride) {
      float factor[4], input[4];
      get_rows<type>(m, factor);
      get_rows<type>(inputs, input);
      BNN_UNROLL
      for (int i = 0; i < 4; ++i)
        for (int b = 0; b < 4; ++b) sums[i][b] = fma_lane(factor[i], input[b], sums[i][b]);
    }
  }

  __device__ void write(const ChainRows<type>& to) const {
    BNN_UNROLL
    for (int i = 0; i < 4; ++i)
      if (feature + i < outer) put_rows<type>(to.of(feature + i, row), sums[i]);
  }
};

// Two numbers of 16 bits, the first in the low half.
__device__ __forceinline__ uint32_t pair_of(const uint16_t* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ __forceinline__ uint32_t pair_of(const uint16_t* p, int step) { return p[0] | static_cast<uint32_t>(p[step]) << 16; }

template <Type type> struct ChainProducts {
  static constexpr int kTiles = 4;
  float sums[kTiles][4] = {};
  int outer, across, tiles, first, g, t;  // tiles: of the block, `across` of them in a column of 8 rows; first: the warp's

  __device__ ChainProducts(int outer, int rows)
      : outer(outer), across(outer > 0 ? (outer + 15) / 16 : 1), tiles(across * (rows / 8)), first(threadIdx.x / 32 * kTiles),
        g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}

  // A slice is [outer][depth + 8], so that pairs of eight neighbouring rows lie on different banks.
  __device__ int width() const { return across * 16; }
  __device__ int depth() const { return (kSlice<type> / width() - 8) / 16 * 16; }
  __device__ int place(int m, int k, int depth) const { return m * (depth + 8) + k; }

  __device__ void multiply(const uint16_t* slice, int depth, const ChainRows<type>& a, int from) {
    for (int k = 0; k < depth; k += 16) {
      BNN_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        if (first + i >= tiles) continue;
        const uint16_t* m = slice + ((first + i) % across * 16 + g) * (depth + 8) + k + 2 * t;
        const uint16_t* inputs = a.of(from + k + 2 * t, (first + i) / across * 8 + g);
        const uint16_t* below = m + 8 * (depth + 8);
        multiply_accumulate<type>(sums[i], pair_of(m), pair_of(below), pair_of(m + 8), pair_of(below + 8), pair_of(inputs, a.stride),
                                  pair_of(inputs + 8 * a.stride, a.stride));
      }
    }
  }

  __device__ void write(const ChainRows<type>& to) const {
    BNN_UNROLL
    for (int i = 0; i < kTiles; ++i)
      BNN_UNROLL
      for (int h = 0; h < 2; ++h) {
        int feature = (first + i) % across * 16 + g + 8 * h;
        if (first + i < tiles && feature < outer)
          *reinterpret_cast<uint32_t*>(to.of(feature, (first + i) / across * 8 + 2 * t)) =
              pack_halves(type, sums[i][2 * h], sums[i][2 * h + 1]);
      }
  }
};

// A layer's weights as a sample has them.
template <Type type> struct ChainWeights {
  const Stored<type>*weight, *bias;  // [outputs][inputs], [outputs] or null
  int inputs, outputs;

  __device__ ChainWeights(const ChainLayer& layer, int64_t sample)
      : weight(static_cast<const Stored<type>*>(layer.weight) + (layer.drawn ? sample * layer.inputs * layer.outputs : 0)),
        bias(static_cast<const Stored<type>*>(layer.bias)), inputs(static_cast<int>(layer.inputs)),
        outputs(static_cast<int>(layer.outputs)) {
    if (bias && layer.drawn) bias += sample * outputs;
  }
  __device__ int columns() const { return inputs + (bias ? 1 : 0); }
  __device__ Stored<type> at(int o, int k) const { return k < inputs ? weight[o * inputs + k] : bias[o]; }
};

// The block's rows of a tile become W A and b, or of W^T (backward) W^T A. Begins with a barrier and ends with one. Rows have been filled.
template <Type type, bool backward>
__device__ __forceinline__ void multiply_layer(const ChainWeights<type>& w, const ChainRows<type>& a, Stored<type>* slice) {
  int outer = backward ? w.inputs : w.outputs, inner = backward ? w.outputs : w.columns(), end = padded<type>(inner);
  ChainProducts<type> products(outer, a.rows);
  int most = products.depth(), width = products.width();
  for (int first = 0; first < end; first += most) {
    int depth = end - first < most ? end - first : most;
    __syncthreads();
    for (int i = threadIdx.x; i < width * depth; i += kThreads) {
      // Neighbouring threads read neighbouring weights.
      int m = backward ? i % width : i / depth, k = backward ? i / width : i % depth;
      bool inside = m < outer && first + k < inner;
      slice[products.place(m, k, depth)] = !inside ? Stored<type>(0) : backward ? w.at(first + k, m) : w.at(m, first + k);
    }
    __syncthreads();
    products.multiply(slice, depth, a, first);
  }
  __syncthreads();
  products.write(a);
  __syncthreads();
}

// Calls use(o, k, sum over the rows of G[o] A[k]) once in the block for each of [outputs, columns].
template <class Use>
__device__ __forceinline__ void for_weight_sums(const ChainRows<Type::kFloat32>& g, const ChainRows<Type::kFloat32>& a, int outputs,
                                                int columns, Use use) {
  constexpr Type type = Type::kFloat32;
  // A thread has every `across`-th column and `down`-th output: neighbouring threads have neighbouring columns.
  int across = (columns + 3) / 4, down = (outputs + 3) / 4;
  for (int i = threadIdx.x; i < across * down; i += kThreads) {
    int k = i % across, o = i / across;
    float sums[4][4] = {};
#pragma unroll 1
    for (int b = 0; b < g.rows; b += 4) {
      float gradient[4][4], input[4][4];
      BNN_UNROLL
      for (int n = 0; n < 4; ++n) {
        get_rows<type>(g.of(min(o + n * down, outputs - 1), b), gradient[n]);
        get_rows<type>(a.of(min(k + n * across, columns - 1), b), input[n]);
      }
      BNN_UNROLL
      for (int m = 0; m < 4; ++m)
        for (int n = 0; n < 4; ++n)
          for (int r = 0; r < 4; ++r) sums[m][n] = fma_lane(gradient[m][r], input[n][r], sums[m][n]);
    }
    BNN_UNROLL
    for (int m = 0; m < 4; ++m)
      for (int n = 0; n < 4; ++n)
        if (o + m * down < outputs && k + n * across < columns) use(o + m * down, k + n * across, sums[m][n]);
  }
}

template <Type type, class Use>
__device__ __forceinline__ void for_weight_sums(const ChainRows<type>& g, const ChainRows<type>& a, int outputs, int columns, Use use) {
  int lane_g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int across = (columns + 7) / 8, tiles = (outputs + 15) / 16 * across;
  for (int tile = threadIdx.x / 32; tile < tiles; tile += kWarps) {
    int o = tile / across * 16 + lane_g, k = tile % across * 8;
    float sums[4] = {};
#pragma unroll 2
    for (int b = 0; b < g.rows; b += 16) {
      const uint16_t *above = g.of(o, b + 2 * t), *below = g.of(o + 8, b + 2 * t), *inputs = a.of(k + lane_g, b + 2 * t);
      multiply_accumulate<type>(sums, pair_of(above), pair_of(below), pair_of(above + 8), pair_of(below + 8), pair_of(inputs),
                                pair_of(inputs + 8));
    }
    BNN_UNROLL
    for (int n = 0; n < 4; ++n) {
      int output = o + n / 2 * 8, column = k + 2 * t + n % 2;
      if (output < outputs && column < columns) use(output, column, sums[n]);
    }
  }
}

}  // namespace bnn_fast
