// The small-batch variational linear layer, backward:
//
//   dW_s = g_s^T x_s,  dx_s = g_s W_s     dmu = sum_s dW_s + k dKL/dmu     drho = sigma' sum_s dW_s eps_s + k dKL/drho
//
// with k dKL_s/dw_s / S added to dW_s where the divergence is the sampled one, and only -(log sigma)' left in dKL/drho.
// A block owns columns of 16 inputs for each of its groups of warps and walks a part of the outputs, 16 at a time: one pass over
// mu and rho. The group computes sigma, sigma' and the KL's gradients into shared memory; each of its warps draws its sample's tile
// again, adds to dx, and forms dW; then the group adds up the samples in order and writes both gradients. dx goes to a workspace;
// a second launch adds its parts in order, and finishes the bias.
#include "backward_bias.cuh"
#include "backward_products.cuh"

namespace bnn_fast {
namespace {

struct BackwardPlan {
  PriorAt<float> prior;  // where it is made of numbers
  bool aligned;
  int members, groups;
  int x_stride;   // of a row of x in shared memory
  int64_t tiles;  // blocks across the inputs
  int steps;      // stages across the outputs: rows are at most 2^32
  Cut cut;
  float* grad_x;  // [parts, samples * batch, columns]
};

// What a group holds of its tile, quad by quad, and what each of its warps leaves there.
struct TileArrays {
  float4 mu[kQuads], sigma[kQuads], d_sigma[kQuads], kl_mu[kQuads], kl_rho[kQuads];
};
struct SampleArrays {
  float4 by_mu[kQuads], by_sigma[kQuads];
};

template <Type type, int kBatch>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) backward_kernel(LayerBackward problem, BackwardPlan plan) {
  using T = Stored<type>;
  constexpr int kStride = kStageStride<type>;
  extern __shared__ float4 shared[];
  const Posterior& p = problem.weight;
  Place at(plan.members);
  TileArrays* tiles = reinterpret_cast<TileArrays*>(shared);
  SampleArrays* samples = reinterpret_cast<SampleArrays*>(tiles + plan.groups);
  T* x_tile = reinterpret_cast<T*>(samples + kWarps);
  T* g_tiles = x_tile + at.members * kBatch * plan.x_stride;
  TileArrays& tile = tiles[at.group];
  SampleArrays& mine = samples[at.group * at.members + at.member];
  int g_size = at.members * kBatch * kStride;

  int64_t counter = (int64_t(blockIdx.x) * plan.groups + at.group) * (kSide / 4) + at.t;
  int64_t first_column = int64_t(blockIdx.x) * plan.groups * kSide - (p.column_offset & 3);
  int step = static_cast<int>(blockIdx.y) * plan.cut.steps_per_part, end = min(step + plan.cut.steps_per_part, plan.steps);
  auto stage_step = [&](int s) {
    stage<kBatch, kStage, kStride>(g_tiles + (s & 1) * g_size, static_cast<const T*>(problem.grad_y), p.rows, int64_t(s) * kStage,
                                   at.members, problem.samples, problem.batch);
  };

  int divergence = problem.grad_kl.data ? problem.divergence : int(kNone);
  float factor = divergence == kNone ? 0.0f : load_element<float>(problem.grad_kl.data, problem.grad_kl.type, 0);
  float share = factor / static_cast<float>(problem.samples);
  QuadNoise noise(p);
  stage_step(step);
  load_inputs<type, kBatch>(static_cast<const T*>(problem.x), plan.members, problem.samples, problem.batch, p.columns, first_column,
                            plan.groups * kSide, plan.x_stride, x_tile);
  x_tile += at.member * kBatch * plan.x_stride + at.group * kSide;
  Products<type, kBatch> products;
  for (; step < end; ++step) {
    if (step + 1 < end) stage_step(step + 1);
    __pipeline_wait_prior(step + 1 < end ? 1 : 0);
    __syncthreads();
    const T* g_tile = g_tiles + (step & 1) * g_size + at.member * kBatch * kStride;
#pragma unroll 1
    for (int half = 0; half < kStage / kSide; ++half) {
      int64_t row = int64_t(step) * kStage + half * kSide + at.g, first = first_column + at.group * kSide + 4 * at.t;
      int64_t start = row * p.columns + first;
      // The lane's quad in the lower or upper eight rows of the tile.
      auto quad_in = [&](int h) { return TileQuad(p, plan.aligned, row + h * 8, first, start + h * 8 * p.columns); };
#pragma unroll 1
      for (int h = at.member; h < 2; h += at.members) {
        int q = h * 32 + at.lane;
        TileQuad quad = quad_in(h);
        float mu[4], rho[4], sigma[4], d_sigma[4], kl_mu[4] = {}, kl_rho[4] = {};
        load_quad<float>(p.mu, p.type, quad, 0.0f, mu);
        load_quad<float>(p.rho, p.type, quad, -INFINITY, rho);
        with_scale(p.scale, [&]<int scale>() {
          Spread<float> spreads[4];
          BNN_UNROLL
          for (int k = 0; k < 4; ++k) {
            spreads[k] = spread<scale>(rho[k]);
            sigma[k] = spreads[k].sigma;
            d_sigma[k] = spreads[k].d_sigma;
            if (divergence == kSampled) kl_rho[k] = times(factor, sampled_kl_by_rho(spreads[k]));
          }
          tile.mu[q] = pack(mu);
          tile.sigma[q] = pack(sigma);
          tile.d_sigma[q] = pack(d_sigma);
          if (divergence == kAnalytic)
            with_prior<float>(p.prior, plan.prior, p.type, quad, [&](auto prior) {
              BNN_UNROLL
              for (int k = 0; k < 4; ++k) {
                kl_mu[k] = times(factor, kl_by_location(mu[k], prior(k)));
                kl_rho[k] = times(factor, kl_by_rho(spreads[k], prior(k)));
              }
            });
        });
        tile.kl_mu[q] = pack(kl_mu);
        tile.kl_rho[q] = pack(kl_rho);
      }
      at.sync_group();
      if (at.member < problem.samples) {
        float w[2][4], eps[2][4], grad_w[2][4] = {};
        BNN_UNROLL
        for (int h = 0; h < 2; ++h) {
          float mu[4], sigma[4];
          unpack(tile.mu[h * 32 + at.lane], mu);
          unpack(tile.sigma[h * 32 + at.lane], sigma);
          noise.draw<float>(at.member, row + h * 8, counter, eps[h]);
          BNN_UNROLL
          for (int k = 0; k < 4; ++k) w[h][k] = fma_lane(sigma[k], eps[h][k], mu[k]);
        }
        products.multiply(w, x_tile, plan.x_stride, g_tile + half * kSide, mine.by_mu, at, grad_w);
        BNN_UNROLL
        for (int h = 0; h < 2; ++h) {
          if (divergence == kSampled)
            with_prior<float>(p.prior, plan.prior, p.type, quad_in(h), [&](auto prior) {
              BNN_UNROLL
              for (int k = 0; k < 4; ++k) grad_w[h][k] += times(share, kl_by_location(w[h][k], prior(k)));
            });
          mine.by_mu[h * 32 + at.lane] = pack(grad_w[h]);
          BNN_UNROLL
          for (int k = 0; k < 4; ++k) grad_w[h][k] *= eps[h][k];
          mine.by_sigma[h * 32 + at.lane] = pack(grad_w[h]);
        }
      }
      at.sync_group();
#pragma unroll 1
      for (int h = at.member; h < 2; h += at.members) {
        int q = h * 32 + at.lane;
        TileQuad quad = quad_in(h);
        float by_mu[4] = {}, by_sigma[4] = {}, sigma[4], d_sigma[4], kl_mu[4], kl_rho[4], rho[4];
#pragma unroll 1
        for (int s = 0; s < problem.samples; ++s) {
          float m[4], r[4];
          unpack(samples[at.group * at.members + s].by_mu[q], m);
          unpack(samples[at.group * at.members + s].by_sigma[q], r);
          BNN_UNROLL
          for (int k = 0; k < 4; ++k) by_mu[k] += m[k], by_sigma[k] += r[k];
        }
        load_quad<float>(p.rho, p.type, quad, -INFINITY, rho);
        unpack(tile.sigma[q], sigma);
        unpack(tile.d_sigma[q], d_sigma);
        unpack(tile.kl_mu[q], kl_mu);
        unpack(tile.kl_rho[q], kl_rho);
        BNN_UNROLL
        for (int k = 0; k < 4; ++k) {
          bool pruned = is_pruned(rho[k]);
          by_mu[k] = pruned ? 0.0f : by_mu[k] + kl_mu[k];
          by_sigma[k] = pruned ? 0.0f : in_full(p.scale, sigma[k], fma_lane(by_sigma[k], d_sigma[k], kl_rho[k]));
        }
        store_quad<float>(problem.grad_mu, p.type, quad, by_mu);
        store_quad<float>(problem.grad_rho, p.type, quad, by_sigma);
      }
    }
    __syncthreads();
  }

  if (!problem.grad_x) return;
  int64_t all = problem.samples * problem.batch;
  float* grad_x = plan.grad_x + blockIdx.y * all * p.columns;
  products.finish(at, [&](int b, const float(&sums)[4]) {
    if (at.member >= problem.samples || b >= problem.batch) return;
    Quad quad(all, p.columns, at.member * problem.batch + b, first_column + at.group * kSide + 4 * at.t);
    store_quad<float>(grad_x, Type::kFloat32, quad, sums);
  });
}

// Adds up the parts of dx, four inputs of one row to a thread; the last blocks finish the bias.
__global__ void __launch_bounds__(kThreads, 2) finish_kernel(LayerBackward problem, BackwardPlan plan, int64_t blocks_for_x) {
  int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (blockIdx.x >= blocks_for_x) {
    int64_t counter = thread - blocks_for_x * kThreads;
    if (counter < quads_in_row(problem.bias)) bias_gradient(problem, counter);
    return;
  }
  int64_t columns = problem.weight.columns, all = problem.samples * problem.batch, quads = (columns + 3) / 4;
  if (thread >= all * quads) return;
  Quad quad(all, columns, thread / quads, thread % quads * 4);
  float sums[4] = {};
  for (int part = 0; part < plan.cut.parts; ++part) {
    float sum[4];
    load_quad<float>(plan.grad_x + part * all * columns, Type::kFloat32, quad, 0.0f, sum);
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) sums[k] += sum[k];
  }
  store_quad<float>(problem.grad_x, problem.x_type, quad, sums);
}

cudaError_t plan_backward(const LayerBackward& problem, BackwardPlan& plan) {
  const Posterior& p = problem.weight;
  plan.prior = prior_of_numbers(p.prior);
  plan.aligned =
      all_aligned(p, {p.mu, p.rho, p.prior.loc_tensor, p.prior.scale_tensor, problem.grad_mu, problem.grad_rho});
  plan.members = members_for(problem.samples);
  plan.groups = kWarps / plan.members;
  plan.x_stride = plan.groups * kSide + (problem.x_type == Type::kFloat32 ? 0 : 8);
  int64_t inputs = plan.groups * kSide;
  plan.tiles = ((p.column_offset & 3) + p.columns + inputs - 1) / inputs;
  plan.steps = static_cast<int>((p.rows + kStage - 1) / kStage);
  plan.grad_x = static_cast<float*>(problem.workspace);
  return cut(plan.tiles, plan.steps, plan.cut);
}

// Of a block's shared memory.
template <Type type, int kBatch> size_t shared_bytes(const BackwardPlan& plan) {
  return plan.groups * sizeof(TileArrays) + kWarps * sizeof(SampleArrays) +
         plan.members * kBatch * (plan.x_stride + 2 * kStageStride<type>) * sizeof(Stored<type>);
}

}  // namespace

extern "C" int64_t bnn_fast_cuda_linear_backward_workspace(const LayerBackward* problem) {
  BackwardPlan plan;
  if (!problem->grad_x || plan_backward(*problem, plan)) return 0;
  return plan.cut.parts * problem->samples * problem->batch * problem->weight.columns * sizeof(float);
}

extern "C" cudaError_t bnn_fast_cuda_linear_backward(const LayerBackward* problem, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  BackwardPlan plan;
  if (cudaError_t error = plan_backward(*problem, plan)) return error;
  cudaError_t error = with_type_and_batch(problem->x_type, problem->batch, [&]<Type type, int kBatch>() {
    return launch_tiles(backward_kernel<type, kBatch>, *problem, plan, shared_bytes<type, kBatch>(plan), queue);
  });
  if (error) return error;
  int64_t quads = problem->grad_x ? problem->samples * problem->batch * ((problem->weight.columns + 3) / 4) : 0;
  int64_t for_x = (quads + kThreads - 1) / kThreads;
  int64_t for_bias = problem->bias.mu ? (quads_in_row(problem->bias) + kThreads - 1) / kThreads : 0;
  if (for_x + for_bias == 0) return cudaSuccess;
  finish_kernel<<<static_cast<unsigned>(for_x + for_bias), kThreads, 0, queue>>>(*problem, plan, for_x);
  return cudaGetLastError();
}

}  // namespace bnn_fast
