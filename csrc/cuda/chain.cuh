// What the passes over a chain of narrow layers share. A block has a tile of a sample's rows, which it takes through all layers in
// shared memory, feature after feature: [features][rows], so that the products of a layer of any width waste no lanes.
//
// In the products (chain_products.cuh) a bias is a weight of one more input, which is always one.
#pragma once

#include "../activation.h"
#include "chain.h"
#include "tile.cuh"

namespace bnn_fast {

// The posterior's quads of a chain, numbered through its tensors.
struct ChainQuad {
  const ChainTensor& tensor;
  int row, counter;

  __device__ ChainQuad(const ChainTensors& tensors, int i) : tensor(find(tensors, i)) {
    int in_row = (tensor.columns + 3) / 4;
    row = (i - tensor.quads) / in_row;
    counter = (i - tensor.quads) % in_row;
  }

 private:
  static __device__ const ChainTensor& find(const ChainTensors& tensors, int i) {
    int t = 0;
    while (t + 1 < tensors.count && tensors.at[t + 1].quads <= i) ++t;
    return tensors.at[t];
  }
};

__device__ __forceinline__ Posterior posterior_of(const ChainTensor& t, const ChainTensors& all) {
  return {t.rows, t.columns, all.type, t.mu, t.rho, all.scale, {t.loc, t.scale, t.loc_tensor, t.scale_tensor}, t.key, t.stream, 0, 0};
}

// How the rows of a sample are cut, and shared memory with them. From the shape alone.
struct ChainTiling {
  int rows;       // in a tile
  int64_t tiles;  // of a sample
  int features;   // that a tile has room for

  // Tiles as large as the sums of a block, smaller where they would leave processors without work.
  explicit ChainTiling(const ChainPass& pass) {
    int64_t widest = pass.layers[0].inputs;
    for (int l = 0; l < pass.count; ++l) widest = pass.layers[l].outputs > widest ? pass.layers[l].outputs : widest;
    rows = widest <= 32 ? 128 : widest <= 64 ? 64 : 32;
    while (rows > 32 && pass.samples * ((pass.batch + rows - 1) / rows) < 132) rows /= 2;
    tiles = (pass.batch + rows - 1) / rows;
    features = static_cast<int>(pass.type == Type::kFloat32 ? widest + 1 : (widest + 16) / 16 * 16);
  }
  // Elements: lanes that read quads, or pairs of 16 bits, of neighbouring features fall on different banks.
  __host__ __device__ int stride(Type type) const { return rows + (type == Type::kFloat32 ? 4 : 8); }
  __host__ __device__ int elements(Type type) const { return features * stride(type); }
};

template <Type type> constexpr int kDepthStep = type == Type::kFloat32 ? 1 : 16;  // of the summed index
template <Type type> __device__ __forceinline__ int padded(int n) { return (n + kDepthStep<type> - 1) / kDepthStep<type> * kDepthStep<type>; }

// Four neighbouring rows of one feature.
template <Type type> __device__ __forceinline__ void get_rows(const Stored<type>* from, float (&v)[4]) {
  load_quad<float>(from, type, WholeQuad{0}, 0.0f, v);
}
template <Type type> __device__ __forceinline__ void put_rows(Stored<type>* to, const float (&v)[4]) {
  if constexpr (type == Type::kFloat32)
    *reinterpret_cast<float4*>(to) = pack(v);
  else
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_halves(type, v[0], v[1]), pack_halves(type, v[2], v[3]));
}

// A tile of rows in shared memory.
template <Type type> struct ChainRows {
  Stored<type>* at;
  int rows, stride;
  int inside;  // rows that the batch has

  __device__ Stored<type>* of(int feature, int row) const { return at + feature * stride + row; }

  // From rows [inside][features] in memory, zero beyond them, and back.
  __device__ void read(const void* from, int features) const {
    auto given = static_cast<const Stored<type>*>(from);
    for (int i = threadIdx.x; i < rows * features; i += kThreads) {
      int row = i / features, feature = i - row * features;
      *of(feature, row) = row < inside ? given[i] : Stored<type>(0);
    }
  }
  __device__ void write(void* to, int features) const {
    for (int i = threadIdx.x; i < inside * features; i += kThreads) {
      int row = i / features, feature = i - row * features;
      static_cast<Stored<type>*>(to)[i] = *of(feature, row);
    }
  }

  // What follows the features: ones for a bias, and zeros up to a whole step of the products.
  __device__ void fill(int features, bool bias) const {
    int end = padded<type>(features + bias);
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - features) * rows; i += kThreads) {
      int beyond = i / rows;
      store_element<float>(of(features + beyond, i - beyond * rows), type, 0, bias && beyond == 0 ? 1.0f : 0.0f);
    }
  }

  // Calls body(its four elements, index) for quads of all features' rows; index counts them as [features][rows].
  template <class Body> __device__ void for_quads(int features, Body body) const {
    for (int i = 4 * threadIdx.x; i < features * rows; i += 4 * kThreads) {
      int feature = i / rows;
      body(of(feature, i - feature * rows), i, i - feature * rows);
    }
  }

  // act(z) of the values z here, which are left in `kept`, unless that is null.
  __device__ void activate_all(const ChainLayer& layer, Stored<type>* kept) const {
    apply(layer, [&](Stored<type>* at, int i, int, auto of) {
      float z[4];
      get_rows<type>(at, z);
      if (kept) put_rows<type>(kept + i, z);
      for (float& v : z) v = of(v).value;
      put_rows<type>(at, z);
    });
  }
  // The same of values z that were kept, zero beyond the batch: an infinite one would be NaN, times its gradient zero.
  __device__ void activate_kept(const ChainLayer& layer, const Stored<type>* kept) const {
    apply(layer, [&](Stored<type>* at, int i, int row, auto of) {
      float z[4];
      get_rows<type>(kept + i, z);
      for (int k = 0; k < 4; ++k) z[k] = row + k < inside ? of(z[k]).value : 0.0f;
      put_rows<type>(at, z);
    });
  }
  // The gradients here times act'(z).
  __device__ void multiply_slopes(const ChainLayer& layer, const Stored<type>* kept) const {
    apply(layer, [&](Stored<type>* at, int i, int row, auto of) {
      float z[4], g[4];
      get_rows<type>(kept + i, z);
      get_rows<type>(at, g);
      for (int k = 0; k < 4; ++k) g[k] = row + k < inside ? g[k] * of(z[k]).slope : 0.0f;
      put_rows<type>(at, g);
    });
  }

 private:
  template <class Body> __device__ void apply(const ChainLayer& layer, Body body) const {
    float first = static_cast<float>(layer.first), second = static_cast<float>(layer.second);
    with_activation(layer.activation, [&]<int kind>() {
      for_quads(static_cast<int>(layer.outputs), [&](Stored<type>* at, int i, int row) {
        body(at, i, row, [&](float z) { return activate<kind>(z, first, second); });
      });
    });
  }
};

}  // namespace bnn_fast
