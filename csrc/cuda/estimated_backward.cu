// The small-batch linear layer by the estimators "local" and "flipout", backward: one pass over mu and rho,
//
//   M = g^T x,  D = h^T z      dmu = M + k dKL/dmu      drho = sigma' (local: sigma D, flipout: eps D) + k dKL/drho
//   dx = g mu + f (h q)        local: h = g eps / sqrt(v), z = x^2, f = x, q = sigma^2
//                              flipout: h = g r, z = x s, f = s, q = sigma eps
//
// A warp owns columns of 16 inputs, whose x and z stay in shared memory, and walks a part of the outputs, 16 at a time. Both
// products of a tile's gradients need no weights and come first, while mu and rho are on their way; then each lane finishes its
// quads, and leaves mu and q in shared memory for the products of dx, whose parts go to a workspace.
#include "backward_products.cuh"
#include "estimated.cuh"

namespace bnn_fast {
namespace {

constexpr int kRowStride = kStageStride<Type::kFloat32>;
constexpr int kInputs = kWarps * kSide;  // of a block

struct BackwardPlan {
  PriorAt<float> prior;  // where it is made of numbers
  bool aligned;
  int64_t tiles;  // blocks across the inputs
  int steps;      // stages across the outputs
  Cut cut;
};

template <int estimator, int kBatch>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) backward_kernel(TwoGradients problem, BackwardPlan plan) {
  constexpr int kSize = kBatch * kRowStride, kInputSize = kBatch * kInputs;
  extern __shared__ float4 shared[];
  const Posterior& p = problem.weight;
  Place at(1);
  Factors& mine = reinterpret_cast<Factors*>(shared)[at.group];
  float* x = reinterpret_cast<float*>(reinterpret_cast<Factors*>(shared) + kWarps);  // then z
  float* staged = x + 2 * kInputSize;                                                // [2 stages][g, h]

  int64_t first_column = int64_t(blockIdx.x) * kInputs, column = first_column + at.group * kSide + 4 * at.t;
  int step = static_cast<int>(blockIdx.y) * plan.cut.steps_per_part, end = min(step + plan.cut.steps_per_part, plan.steps);
  auto stage_step = [&](int s) {
    float* to = staged + (s & 1) * 2 * kSize;
    for (const float* from : {problem.g, problem.h}) {
      stage<kBatch, kStage, kRowStride>(to, from, p.rows, int64_t(s) * kStage, 1, 1, problem.batch);
      to += kSize;
    }
  };

  float factor = problem.grad_kl.data ? load_element<float>(problem.grad_kl.data, Type::kFloat32, 0) : 0.0f;
  bool with_kl = problem.grad_kl.data && problem.divergence == kAnalytic;
  QuadNoise noise(p);
  stage_step(step);
  load_inputs<Type::kFloat32, kBatch>(problem.x, 1, 1, problem.batch, p.columns, first_column, kInputs, kInputs, x);
  load_inputs<Type::kFloat32, kBatch>(problem.z, 1, 1, problem.batch, p.columns, first_column, kInputs, kInputs, x + kInputSize);
  x += at.group * kSide;
  Products<Type::kFloat32, kBatch> first, second;
  for (; step < end; ++step) {
    if (step + 1 < end) stage_step(step + 1);
    __pipeline_wait_prior(step + 1 < end ? 2 : 0);
    __syncthreads();
    const float* g = staged + (step & 1) * 2 * kSize;
#pragma unroll 1
    for (int half = 0; half < kStage / kSide; ++half, g += kSide) {
      int64_t row = int64_t(step) * kStage + half * kSide + at.g, start = row * p.columns + column;
      auto quad_in = [&](int h) { return TileQuad(p, plan.aligned, row + h * 8, column, start + h * 8 * p.columns); };
      float mu[2][4], rho[2][4], by_mu[2][4] = {}, by_q[2][4] = {};
      BNN_UNROLL
      for (int h = 0; h < 2; ++h) {
        load_quad<float>(p.mu, p.type, quad_in(h), 0.0f, mu[h]);
        load_quad<float>(p.rho, p.type, quad_in(h), -INFINITY, rho[h]);
      }
      first.outer(x, kInputs, g, at, by_mu);
      second.outer(x + kInputSize, kInputs, g + kSize, at, by_q);
      BNN_UNROLL
      for (int h = 0; h < 2; ++h) {
        TileQuad quad = quad_in(h);
        float q[4], eps[4], by_rho[4];
        if constexpr (estimator == kFlipout) noise.normals<float>(0, row + h * 8, column / 4, eps);
        with_scale(p.scale, [&]<int scale>() {
          Spread<float> spreads[4];
          BNN_UNROLL
          for (int k = 0; k < 4; ++k) {
            spreads[k] = spread<scale>(rho[h][k]);
            q[k] = second_factor<estimator>(spreads[k].sigma, eps[k]);
            by_rho[k] = by_sigma_of<estimator>(by_q[h][k], spreads[k].sigma, eps[k]) * spreads[k].d_sigma;
          }
          if (with_kl)
            with_prior<float>(p.prior, plan.prior, p.type, quad, [&](auto prior) {
              BNN_UNROLL
              for (int k = 0; k < 4; ++k) {
                by_mu[h][k] += times(factor, kl_by_location(mu[h][k], prior(k)));
                by_rho[k] += times(factor, kl_by_rho(spreads[k], prior(k)));
              }
            });
          BNN_UNROLL
          for (int k = 0; k < 4; ++k) {
            bool pruned = is_pruned(rho[h][k]);
            by_mu[h][k] = pruned ? 0.0f : by_mu[h][k];
            by_rho[k] = pruned ? 0.0f : in_full(scale, spreads[k].sigma, by_rho[k]);
          }
        });
        mine.mu[h * 32 + at.lane] = pack(mu[h]);
        mine.q[h * 32 + at.lane] = pack(q);
        store_quad<float>(problem.grad_mu, p.type, quad, by_mu[h]);
        store_quad<float>(problem.grad_rho, p.type, quad, by_rho);
      }
      __syncwarp();
      first.back(mine.mu, g, at);
      second.back(mine.q, g + kSize, at);
      __syncwarp();
    }
    __syncthreads();
  }

  if (!problem.grad_x) return;
  first.gather();
  second.gather();
  float* grad_x = problem.grad_x + blockIdx.y * problem.batch * p.columns;
  BNN_UNROLL
  for (int i = 0; i < first.kRows; ++i) {
    Quad quad(problem.batch, p.columns, at.g + 8 * i, column);
    float f[4], sum[4];
    load_quad<float>(problem.f, Type::kFloat32, quad, 0.0f, f);
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) sum[k] = fma_lane(f[k], second.grad_x[i][k], first.grad_x[i][k]);
    store_quad<float>(grad_x, Type::kFloat32, quad, sum);
  }
}

cudaError_t plan_backward(const TwoGradients& problem, BackwardPlan& plan) {
  const Posterior& p = problem.weight;
  plan.prior = prior_of_numbers(p.prior);
  plan.aligned =
      all_aligned(p, {p.mu, p.rho, p.prior.loc_tensor, p.prior.scale_tensor, problem.grad_mu, problem.grad_rho});
  plan.tiles = (p.columns + kInputs - 1) / kInputs;
  plan.steps = static_cast<int>((p.rows + kStage - 1) / kStage);
  return cut(plan.tiles, plan.steps, plan.cut);
}

}  // namespace

extern "C" int64_t bnn_fast_cuda_estimated_backward_parts(const TwoGradients* problem) {
  BackwardPlan plan;
  return plan_backward(*problem, plan) ? 0 : plan.cut.parts;
}

extern "C" cudaError_t bnn_fast_cuda_estimated_backward(const TwoGradients* problem, void* stream) {
  BackwardPlan plan;
  if (cudaError_t error = plan_backward(*problem, plan)) return error;
  return with_estimator_and_batch(problem->estimator, problem->batch, [&]<int estimator, int kBatch>() {
    size_t bytes = kWarps * sizeof(Factors) + 2 * kBatch * (kInputs + 2 * kRowStride) * sizeof(float);
    return launch_tiles(backward_kernel<estimator, kBatch>, *problem, plan, bytes, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace bnn_fast
