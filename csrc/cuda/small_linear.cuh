// What the forward and the backward of small layers share: how a batch is cut over blocks, how its rows and
// drawn weights come into shared memory, and the product of the two.
//
// In shared memory a row of n elements is row_stride(n) long: a whole number of quads, and an odd one, so
// that threads that read quads of neighbouring rows fall on different banks. What is behind its n elements is
// zero.
#pragma once

#include "linear.h"
#include "quad.cuh"

namespace bnn_fast {

// Enough for 16 x 17 squares of 4 x 4 gradients: 64 x 64, and the bias.
constexpr int kSmallThreads = 320;
constexpr int kSmallBlocks = 264;            // at most, over the batch: two on each processor of an H200
constexpr int kSmallRows = 64;               // at most, in a tile
constexpr int kQuadsAhead = 2;               // of a tile, that a thread holds in registers
constexpr int kSmallSharedBytes = 47 << 10;  // of 48 KiB; block_sum has some

constexpr __host__ __device__ int row_stride(int n) { return ((n + 3) / 4 | 1) * 4; }

// How each sample's batch is cut: tile t belongs to the block of chunk t % chunks. From the shape alone.
struct Tiling {
  int64_t batch, tiles;
  int rows;  // in a tile: a multiple of 4
  int chunks;
};

// Of shared memory, `fixed` elements are needed beside the tiles and per_row for each row in a tile, all of
// so many bytes. widest: the longest row that is staged.
inline Tiling make_tiling(int64_t batch, int64_t samples, int widest, int fixed, int per_row, int bytes) {
  int64_t blocks = kSmallBlocks / samples > 1 ? kSmallBlocks / samples : 1;
  int64_t wanted = (batch + blocks - 1) / blocks;
  int rows = wanted <= 16 ? 16 : wanted < kSmallRows ? static_cast<int>(wanted + 3) : kSmallRows;
  for (int bound : {(kSmallSharedBytes / bytes - fixed) / per_row, kSmallThreads * kQuadsAhead * 4 / widest})
    if (bound < rows) rows = bound;
  rows -= rows % 4;
  int64_t tiles = (batch + rows - 1) / rows;
  return {batch, tiles, rows, static_cast<int>(tiles < 1 ? 1 : tiles < blocks ? tiles : blocks)};
}

// The quads of a layer: those of the weight, row by row, then the bias's.
struct LayerQuads {
  int in_row, of_weight, count;

  LayerQuads(const Posterior& weight, const Posterior& bias)
      : in_row(static_cast<int>(quads_in_row(weight))),
        of_weight(in_row * static_cast<int>(weight.rows)),
        count(of_weight + (bias.mu ? static_cast<int>(quads_in_row(bias)) : 0)) {}
};

struct LayerQuad {
  bool of_bias;
  Posterior posterior;
  int row, counter;

  __device__ LayerQuad(const Posterior& weight, const Posterior& bias, const LayerQuads& quads, int i)
      : of_bias(i >= quads.of_weight), posterior(of_bias ? bias : weight) {
    row = of_bias ? 0 : i / quads.in_row;
    counter = of_bias ? i - quads.of_weight : i - row * quads.in_row;
  }
  __device__ Quad quad() const { return quad_at(posterior, row, counter); }
  __device__ int first_column() const { return counter * 4 - static_cast<int>(posterior.column_offset & 3); }
};

// A quad in shared memory or in the workspace.
template <class F> struct alignas(16) Four {
  F v[4];
};
template <class F> __device__ __forceinline__ Four<F>& four_at(F* p) {
  return *reinterpret_cast<Four<F>*>(p);
}
template <class F> __device__ __forceinline__ const Four<F>& four_at(const F* p) {
  return *reinterpret_cast<const Four<F>*>(p);
}

// A tile of rows: read into registers, put into shared memory later; what is computed between hides the
// reading.
template <class F> struct RowsAhead {
  Four<F> quads[kQuadsAhead];

  // Of an activation [samples * batch, columns]; zero behind the batch.
  __device__ __forceinline__ void fetch(const void* data, Type type, int columns, const Tiling& tiling,
                                        int64_t sample, int64_t tile) {
    int64_t first = tile * tiling.rows, end = first + tiling.rows;
    if (end > tiling.batch) end = tiling.batch;
    first = (sample * tiling.batch + first) * columns;
    end = (sample * tiling.batch + end) * columns;
    for (int n = 0; n < kQuadsAhead; ++n) {
      Quad quad(1, end, 0, first + 4 * (threadIdx.x + n * kSmallThreads));
      load_quad<F>(data, type, quad, F(0), quads[n].v);
    }
  }

  __device__ __forceinline__ void put(F* tile, int rows, int columns, int stride) const {
    for (int n = 0; n < kQuadsAhead; ++n) {
      int i = 4 * (threadIdx.x + n * kSmallThreads);
      if (i >= rows * columns) continue;
      int row = i / columns, column = i - row * columns;
      if (columns % 4 == 0) {
        four_at(tile + row * stride + column) = quads[n];
      } else {
        for (int k = 0; k < 4; ++k) {
          tile[row * stride + column] = quads[n].v[k];
          if (++column == columns) column = 0, ++row;
        }
      }
    }
  }
};

// Rounds to an activation's type.
template <class F> __device__ __forceinline__ F rounded(F value, Type type) {
  if constexpr (sizeof(F) == 4) {
    if (type == Type::kBFloat16) return __bfloat162float(__float2bfloat16_rn(value));
    if (type == Type::kFloat16) return __half2float(__float2half_rn(value));
  }
  return value;
}

// Draws one sample's first `count` quads, in x's type: weight [r, c] to w[r * row_step + c * column_step],
// the bias to b.
template <class F>
__device__ __forceinline__ void draw_layer(const Posterior& weight, const Posterior& bias,
                                           const LayerQuads& quads, int count, int64_t sample, Type x_type,
                                           F* w, int row_step, int column_step, F* b) {
  for (int i = threadIdx.x; i < count; i += kSmallThreads) {
    LayerQuad at(weight, bias, quads, i);
    const Posterior& p = at.posterior;
    Quad quad = at.quad();
    QuadNoise noise(p);  // first, for its loads
    F mu[4], rho[4], sigma[4], eps[4];
    load_quad<F>(p.mu, p.type, quad, F(0), mu);
    load_quad<F>(p.rho, p.type, quad, F(0), rho);
    with_scale(p.scale, [&]<int scale>() {
      for (int k = 0; k < 4; ++k) sigma[k] = spread<scale>(rho[k]).sigma;
    });
    noise.draw<F>(sample, at.row, at.counter, eps);
    int step = at.of_bias ? 1 : column_step;
    F* to = (at.of_bias ? b : w + at.row * row_step) + at.first_column() * step;
    for (int k = 0; k < 4; ++k)
      if (quad.inside(k)) to[k * step] = rounded(fma_lane(sigma[k], eps[k], mu[k]), x_type);
  }
}

// store(b, j, sum_k a[b, k] m[j, k]) for all rows b of a tile and all j < columns. A thread takes one j and
// four rows, each a quarter of the tile from the next: neighbouring threads store neighbouring elements.
template <class F, class Store>
__device__ __forceinline__ void multiply(const F* a, const F* m, int rows, int columns, int inner,
                                         Store store) {
  int quarter = rows / 4, stride = row_stride(inner);
  for (int i = threadIdx.x; i < quarter * columns; i += kSmallThreads) {
    int row = i / columns, j = i - row * columns;
    F sum[4] = {};
#pragma unroll 1  // more at once would take too many registers for two blocks on a processor
    for (int k = 0; k < inner; k += 4) {
      Four<F> factor = four_at(m + j * stride + k);
      for (int r = 0; r < 4; ++r) {
        Four<F> x = four_at(a + (row + r * quarter) * stride + k);
        for (int n = 0; n < 4; ++n) sum[r] = fma_lane(x.v[n], factor.v[n], sum[r]);
      }
    }
    for (int r = 0; r < 4; ++r) store(row + r * quarter, j, sum[r]);
  }
}

}  // namespace bnn_fast
