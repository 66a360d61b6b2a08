// The small-batch linear layer by the estimators "local" and "flipout", forward: two products in one pass over mu and rho,
//
//   first = x mu^T,  second = z q^T      local: z = x^2, q = sigma^2      flipout: z = x s, q = sigma eps      kl = sum_oi KL
//
// A warp owns rows of 16 outputs and walks a part of the inputs, 64 at a time, while the next 64 of x and z are on their way to
// shared memory. A lane makes q of its quads, and multiplies by mu and q at once, in float32 for every type of x: squares leave
// the range of 16 bits. What has been summed goes to a workspace, of which estimated_outputs.cu makes y; an output's sums for
// kBatch rows of x lie together there, so that their addresses differ by constants and take no registers.
#include "estimated.cuh"
#include "forward_products.cuh"

namespace bnn_fast {
namespace {

constexpr int kRowStride = kStageStride<Type::kFloat32>;

struct ForwardPlan {
  PriorAt<float> prior;  // where it is made of numbers
  bool aligned;
  int64_t tiles;  // blocks across the outputs
  int steps;      // stages across the inputs
  Cut cut;
};

template <int estimator, int kBatch>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) forward_kernel(TwoProducts problem, ForwardPlan plan) {
  constexpr int kSize = kBatch * kRowStride;  // of a stage
  extern __shared__ float4 shared[];
  const Posterior& p = problem.weight;
  Place at(1);
  Factors& mine = reinterpret_cast<Factors*>(shared)[at.group];
  float* staged = reinterpret_cast<float*>(reinterpret_cast<Factors*>(shared) + kWarps);  // [2 stages][x, z]
  int64_t row = (int64_t(blockIdx.x) * kWarps + at.group) * kSide + at.g, start = row * p.columns;
  int step = static_cast<int>(blockIdx.y) * plan.cut.steps_per_part, end = min(step + plan.cut.steps_per_part, plan.steps);
  auto stage_step = [&](int s) {
    float* to = staged + (s & 1) * 2 * kSize;
    for (const float* from : {problem.x, problem.z}) {
      stage<kBatch, kStage, kRowStride>(to, from, p.columns, int64_t(s) * kStage, 1, 1, problem.batch);
      to += kSize;
    }
  };

  QuadNoise noise(p);
  Products<Type::kFloat32, kBatch> first, second;
  double kl = 0;
  stage_step(step);
  for (; step < end; ++step) {
    if (step + 1 < end) stage_step(step + 1);
    __pipeline_wait_prior(step + 1 < end ? 2 : 0);
    __syncthreads();
    const float* x = staged + (step & 1) * 2 * kSize;
#pragma unroll 1
    for (int tile = 0; tile < kStage / kSide; ++tile, x += kSide) {
      int64_t counter = int64_t(step) * (kStage / 4) + tile * (kSide / 4) + at.t, column = counter * 4;
#pragma unroll 1
      for (int h = 0; h < 2; ++h) {
        TileQuad quad(p, plan.aligned, row + h * 8, column, start + h * 8 * p.columns + column);
        float mu[4], rho[4], q[4], eps[4];
        load_quad<float>(p.mu, p.type, quad, 0.0f, mu);
        load_quad<float>(p.rho, p.type, quad, -INFINITY, rho);
        if constexpr (estimator == kFlipout) noise.normals<float>(0, row + h * 8, counter, eps);
        with_scale(p.scale, [&]<int scale>() {
          Spread<float> spreads[4];
          BNN_UNROLL
          for (int k = 0; k < 4; ++k) {
            spreads[k] = spread<scale>(rho[k]);
            q[k] = second_factor<estimator>(spreads[k].sigma, eps[k]);
          }
          if (problem.divergence == kAnalytic)
            with_prior<float>(p.prior, plan.prior, p.type, quad,
                              [&](auto prior) { kl += quad_kl<scale>(mu, rho, spreads, prior); });
        });
        mine.mu[h * 32 + at.lane] = pack(mu);  // which a lane reads itself: there are no registers for both halves
        mine.q[h * 32 + at.lane] = pack(q);
      }
      float mu[2][4], q[2][4];
      BNN_UNROLL
      for (int h = 0; h < 2; ++h) {
        unpack(mine.mu[h * 32 + at.lane], mu[h]);
        unpack(mine.q[h * 32 + at.lane], q[h]);
      }
      first.multiply(mu, x, at);
      second.multiply(q, x + kSize, at);
    }
    __syncthreads();
  }

  float* sums = problem.sums + (blockIdx.y * 2 * p.rows + row) * kBatch;
  auto write = [&](int h, int b, float sum) {
    if (row + h * 8 < p.rows) sums[h * 8 * kBatch + b] = sum;
  };
  first.finish(at, write);
  sums += p.rows * kBatch;
  second.finish(at, write);
  if (problem.divergence == kNone) return;
  kl = block_sum(kl);
  if (threadIdx.x == 0) problem.kl[blockIdx.y * plan.tiles + blockIdx.x] = kl;
}

cudaError_t plan_forward(const TwoProducts& problem, ForwardPlan& plan) {
  const Posterior& p = problem.weight;
  plan.prior = prior_of_numbers(p.prior);
  plan.aligned = all_aligned(p, {p.mu, p.rho, p.prior.loc_tensor, p.prior.scale_tensor});
  plan.tiles = (p.rows + kWarps * kSide - 1) / (kWarps * kSide);
  plan.steps = static_cast<int>((p.columns + kStage - 1) / kStage);
  return cut(plan.tiles, plan.steps, plan.cut);
}

}  // namespace

extern "C" EstimatedParts bnn_fast_cuda_estimated_forward_parts(const TwoProducts* problem) {
  ForwardPlan plan;
  if (plan_forward(*problem, plan)) return {0, 0};
  return {plan.cut.parts, plan.cut.parts * plan.tiles};
}

extern "C" cudaError_t bnn_fast_cuda_estimated_forward(const TwoProducts* problem, void* stream) {
  ForwardPlan plan;
  if (cudaError_t error = plan_forward(*problem, plan)) return error;
  return with_estimator_and_batch(problem->estimator, problem->batch, [&]<int estimator, int kBatch>() {
    size_t bytes = kWarps * sizeof(Factors) + 4 * kBatch * kRowStride * sizeof(float);
    return launch_tiles(forward_kernel<estimator, kBatch>, *problem, plan, bytes, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace bnn_fast
