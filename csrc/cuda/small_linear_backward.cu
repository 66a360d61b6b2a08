// A variational linear layer of at most 64 x 64 weights, backward, in two launches:
//
//   dx_s = g_s W_s,   dW_s = g_s^T x_s,   db_s = sum_b g_s[b]
//   dmu = sum_s dW_s + k dKL/dmu,   drho = sigma' sum_s dW_s eps_s + k dKL/drho,   and so for the bias
//
// First, each block walks its part of a sample's batch, tile by tile: it writes dx from weights drawn into
// shared memory again, and sums its part of dW and db in registers, to write it once. Second, a warp for each
// quad of parameters adds the parts, with their noise, and puts the gradients together. With the sampled
// divergence k dKL_s/dw_s / S is added to dW_s, and only -(log sigma)' is left in dKL/drho.
#include "quad_gradient.cuh"
#include "small_linear.cuh"

namespace bnn_fast {
namespace {

constexpr int kMostGroups = 32;  // of threads that share a tile: their sums are added one after another

// From the shape alone; whether dx is wanted changes no sum.
struct Plan {
  LayerQuads quads;
  int columns;          // of x as it is staged: the bias has a constant input 1, one more column
  int across, squares;  // of 4 x 4 elements of dW, one to a thread: in a row, in all
  int groups;
  Tiling tiling;
  size_t shared, parts;  // bytes

  explicit Plan(const LayerBackward& problem) : quads(problem.weight, problem.bias) {
    int outputs = static_cast<int>(problem.weight.rows), inputs = static_cast<int>(problem.weight.columns);
    int size = problem.weight.type == Type::kFloat64 ? 8 : 4;
    columns = inputs + (problem.bias.mu ? 1 : 0);
    across = (columns + 3) / 4;
    squares = (outputs + 3) / 4 * across;
    groups = kSmallThreads / squares < kMostGroups ? kSmallThreads / squares : kMostGroups;
    int fixed = inputs * row_stride(outputs), per_row = row_stride(outputs) + row_stride(columns);
    int widest = outputs > inputs ? outputs : inputs;
    tiling = make_tiling(problem.batch, problem.samples, widest, fixed, per_row, size);
    int tiles = fixed + tiling.rows * per_row, sums = groups * outputs * columns;
    shared = static_cast<size_t>(tiles > sums ? tiles : sums) * size;
    parts = static_cast<size_t>(problem.samples * tiling.chunks * quads.count) * 4 * size;
  }
};

// parts: [samples, chunks, quads, 4].
template <class F>
__global__ void __launch_bounds__(kSmallThreads, sizeof(F) == 4 ? 2 : 1)
    small_parts_kernel(LayerBackward problem, Plan plan) {
  extern __shared__ double2 shared[];
  const LayerQuads& quads = plan.quads;
  const Tiling& tiling = plan.tiling;
  int rows = tiling.rows, columns = plan.columns;
  int outputs = static_cast<int>(problem.weight.rows), inputs = static_cast<int>(problem.weight.columns);
  int g_stride = row_stride(outputs), x_stride = row_stride(columns);
  F* g = reinterpret_cast<F*>(shared);  // [rows, outputs]
  F* x = g + rows * g_stride;           // [rows, columns]
  F* weight = x + rows * x_stride;      // [inputs, outputs]: transposed, and absent without dx
  int64_t sample = blockIdx.x / tiling.chunks;

  RowsAhead<F> g_ahead, x_ahead;
  auto fetch = [&](int64_t tile) {
    g_ahead.fetch(problem.grad_y, problem.x_type, outputs, tiling, sample, tile);
    x_ahead.fetch(problem.x, problem.x_type, inputs, tiling, sample, tile);
  };
  int64_t tile = blockIdx.x % tiling.chunks;
  fetch(tile);
  int used = rows * (g_stride + x_stride) + (problem.grad_x ? inputs * g_stride : 0);
  for (int i = threadIdx.x; i < used; i += kSmallThreads) g[i] = 0;
  __syncthreads();
  if (columns > inputs && threadIdx.x < rows) x[threadIdx.x * x_stride + inputs] = 1;
  if (problem.grad_x)
    draw_layer<F>(problem.weight, problem.bias, quads, quads.of_weight, sample, problem.x_type, weight, 1,
                  g_stride, nullptr);

  int groups = plan.groups, group = threadIdx.x / plan.squares, square = threadIdx.x % plan.squares;
  int o = square / plan.across * 4, c = square % plan.across * 4;
  F sums[4][4] = {};
  for (; tile < tiling.tiles; tile += tiling.chunks) {
    __syncthreads();
    g_ahead.put(g, rows, outputs, g_stride);
    x_ahead.put(x, rows, inputs, x_stride);
    __syncthreads();
    fetch(tile + tiling.chunks);
    for (int b = group; group < groups && b < rows; b += groups) {
      Four<F> gradient = four_at(g + b * g_stride + o), input = four_at(x + b * x_stride + c);
      for (int m = 0; m < 4; ++m)
        for (int n = 0; n < 4; ++n) sums[m][n] = fma_lane(gradient.v[m], input.v[n], sums[m][n]);
    }
    if (problem.grad_x) {
      int64_t first = tile * rows, inside = tiling.batch - first;
      first = (sample * tiling.batch + first) * inputs;
      multiply(g, weight, rows, inputs, outputs, [&](int b, int i, F sum) {
        if (b < inside) store_element<F>(problem.grad_x, problem.x_type, first + b * inputs + i, sum);
      });
    }
  }
  __syncthreads();

  // The groups' sums take the place of the tiles: [groups, outputs, columns].
  F* of_groups = g;
  for (int m = 0; m < 4; ++m)
    for (int n = 0; n < 4; ++n)
      if (group < groups && o + m < outputs && c + n < columns)
        of_groups[(group * outputs + o + m) * columns + c + n] = sums[m][n];
  __syncthreads();
  F* part = static_cast<F*>(problem.workspace) + int64_t(blockIdx.x) * quads.count * 4;
  for (int i = threadIdx.x; i < quads.count * 4; i += kSmallThreads) {
    LayerQuad at(problem.weight, problem.bias, quads, i / 4);
    int column = at.first_column() + i % 4;
    F sum = 0;
    if (column >= 0 && column < at.posterior.columns) {
      const F* from = of_groups + (at.of_bias ? column * columns + inputs : at.row * columns + column);
      for (int n = 0; n < groups; ++n) sum += from[n * outputs * columns];
    }
    part[i] = sum;
  }
}

// One warp for each quad.
template <class F>
__global__ void __launch_bounds__(32, 8) small_gradient_kernel(LayerBackward problem, Plan plan, int lanes) {
  LayerQuad at(problem.weight, problem.bias, plan.quads, blockIdx.x);
  const Posterior& p = at.posterior;
  int chunks = plan.tiling.chunks, quads = plan.quads.count;
  F grad_mu[4], grad_rho[4];
  auto add_parts = [&](int64_t s, int chunk, F (&gradient)[4]) {
    Four<F> part = four_at(static_cast<const F*>(problem.workspace) + ((s * chunks + chunk) * quads + blockIdx.x) * 4);
    for (int n = 0; n < 4; ++n) gradient[n] += part.v[n];
  };
  warp_gradient<F>(p, problem.divergence, problem.grad_kl, at.row, at.counter, problem.samples, chunks, lanes, add_parts, grad_mu,
                   grad_rho);
  if (threadIdx.x > 0) return;
  store_quad<F>(at.of_bias ? problem.grad_bias_mu : problem.grad_mu, p.type, at.quad(), grad_mu);
  store_quad<F>(at.of_bias ? problem.grad_bias_rho : problem.grad_rho, p.type, at.quad(), grad_rho);
}

template <class F> cudaError_t launch(const LayerBackward& problem, cudaStream_t stream) {
  Plan plan(problem);
  int64_t blocks = problem.samples * plan.tiling.chunks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  small_parts_kernel<F><<<static_cast<unsigned>(blocks), kSmallThreads, plan.shared, stream>>>(problem, plan);
  if (cudaError_t error = cudaGetLastError()) return error;
  int lanes = 1;
  while (lanes < plan.tiling.chunks && lanes < 32) lanes *= 2;
  small_gradient_kernel<F><<<plan.quads.count, 32, 0, stream>>>(problem, plan, lanes);
  return cudaGetLastError();
}

}  // namespace

extern "C" int64_t bnn_fast_cuda_small_backward_workspace(const LayerBackward* problem) {
  return static_cast<int64_t>(Plan(*problem).parts);
}

extern "C" cudaError_t bnn_fast_cuda_small_backward(const LayerBackward* problem, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  auto launch_type = problem->weight.type == Type::kFloat64 ? launch<double> : launch<float>;
  return launch_type(*problem, queue);
}

}  // namespace bnn_fast
