// The small-batch variational linear layer, forward:
//
//   y_s[b, o] = sum_i x_s[b, i] w_s[o, i] + bias_s[o],   w_s = mu + sigma(rho) eps_s        kl = sum_oi KL + sum_o KL
//
// A block owns rows of 16 outputs for each of its groups of warps and walks a part of the inputs, 64 at a time, while the next
// 64 of x are on their way to shared memory. Of 32 inputs at a time a group computes sigma and the KL once, into shared memory;
// each of its warps draws the weights of its own sample in registers and multiplies them at once: by fused multiply-adds in
// float32, rounded once to x's type on the tensor cores for 16-bit x. Weights are never written. What a block has summed goes to a
// workspace; a second launch adds the parts in order, adds the bias, and sums the KL.
#include "forward_products.cuh"

namespace bnn_fast {
namespace {

constexpr int kChunk = 2 * kSide;  // inputs whose sigma is held at a time
constexpr int kChunkQuads = 2 * kQuads;

struct ForwardPlan {
  PriorAt<float> prior;  // where it is made of numbers
  bool aligned;
  int members;
  int arrays;            // of a chunk's quads in shared memory: mu, sigma, log sigma
  int64_t tiles;         // blocks across the outputs
  int steps;             // stages across the inputs: columns are at most 2^34
  Cut cut;
  float* sums;   // [parts, samples * batch, rows]
  double* kl;    // [parts * tiles]
};

template <Type type, int kBatch>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) forward_kernel(LayerForward problem, ForwardPlan plan) {
  using T = Stored<type>;
  constexpr int kStride = kStageStride<type>;
  extern __shared__ float4 shared[];
  const Posterior& p = problem.weight;
  Place at(plan.members);
  bool sampled = problem.divergence == kSampled;
  float4* mu_tile = shared + at.group * plan.arrays * kChunkQuads;
  float4* sigma_tile = mu_tile + kChunkQuads;
  float4* log_sigma_tile = sigma_tile + kChunkQuads;  // for the sampled divergence alone
  T* x_tiles = reinterpret_cast<T*>(shared + kWarps / at.members * plan.arrays * kChunkQuads);
  int x_size = at.members * kBatch * kStride;

  const T* x = static_cast<const T*>(problem.x);
  int shift = static_cast<int>(p.column_offset & 3);
  int64_t row = (int64_t(blockIdx.x) * (kWarps / at.members) + at.group) * kSide + at.g, start = row * p.columns;
  int step = static_cast<int>(blockIdx.y) * plan.cut.steps_per_part, end = min(step + plan.cut.steps_per_part, plan.steps);
  auto stage_step = [&](int s) {
    stage<kBatch, kStage, kStride>(x_tiles + (s & 1) * x_size, x, p.columns, int64_t(s) * kStage - shift, at.members, problem.samples,
                                   problem.batch);
  };

  QuadNoise noise(p);
  Products<type, kBatch> products;
  double kl = 0;
  stage_step(step);
  int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (problem.divergence != kNone && problem.bias.mu && blockIdx.y == 0 && thread < quads_in_row(problem.bias))
    kl = quad_divergence<float>(problem.bias, problem.divergence, 0, thread, 0, problem.samples, 1);
  for (; step < end; ++step) {
    if (step + 1 < end) stage_step(step + 1);
    __pipeline_wait_prior(step + 1 < end ? 1 : 0);
    __syncthreads();
    const T* x_tile = x_tiles + (step & 1) * x_size + at.member * kBatch * kStride;
#pragma unroll 1
    for (int chunk = 0; chunk < kStage / kChunk; ++chunk) {
      int64_t counter = int64_t(step) * (kStage / 4) + chunk * (kChunk / 4) + at.t;  // of the lane's first quad
      int64_t first = counter * 4 - shift;
      // The lane's quad in a half of a tile, which is eight rows.
      auto quad_in = [&](int half) {
        bool lower = half & 1;
        int64_t c = first + (half >> 1) * kSide;
        return TileQuad(p, plan.aligned, row + (lower ? 8 : 0), c, start + (lower ? 8 * p.columns : 0) + c);
      };
#pragma unroll 1
      for (int half = at.member; half < kChunkQuads / 32; half += at.members) {
        int q = half * 32 + at.lane;
        TileQuad quad = quad_in(half);
        float mu[4], rho[4], sigma[4], log_sigma[4];
        load_quad<float>(p.mu, p.type, quad, 0.0f, mu);
        load_quad<float>(p.rho, p.type, quad, -INFINITY, rho);
        with_scale(p.scale, [&]<int scale>() {
          Spread<float> spreads[4];
          BNN_UNROLL
          for (int k = 0; k < 4; ++k) {
            spreads[k] = spread<scale>(rho[k]);
            sigma[k] = spreads[k].sigma;
            log_sigma[k] = is_pruned(rho[k]) ? INFINITY : spreads[k].log_sigma;  // which no sigma has
          }
          if (problem.divergence == kAnalytic)
            with_prior<float>(p.prior, plan.prior, p.type, quad,
                              [&](auto prior) { kl += quad_kl<scale>(mu, rho, spreads, prior); });
          if (sampled) log_sigma_tile[q] = pack(log_sigma);
        });
        mu_tile[q] = pack(mu);
        sigma_tile[q] = pack(sigma);
      }
      at.sync_group();
      if (at.member < problem.samples) {
#pragma unroll 1
        for (int tile = 0; tile < kChunk / kSide; ++tile) {
          float w[2][4];
          BNN_UNROLL
          for (int h = 0; h < 2; ++h) {
            int q = tile * kQuads + h * 32 + at.lane;
            float mu[4], sigma[4], eps[4];
            unpack(mu_tile[q], mu);
            unpack(sigma_tile[q], sigma);
            noise.draw<float>(at.member, row + h * 8, counter + tile * (kSide / 4), eps);
            BNN_UNROLL
            for (int k = 0; k < 4; ++k) w[h][k] = fma_lane(sigma[k], eps[k], mu[k]);
            if (sampled) {
              float log_sigma[4];
              unpack(log_sigma_tile[q], log_sigma);
              with_prior<float>(p.prior, plan.prior, p.type, quad_in(tile * 2 + h), [&](auto prior) {
                BNN_UNROLL
                for (int k = 0; k < 4; ++k)
                  if (!(log_sigma[k] > largest<float>())) kl += kl_sampled(w[h][k], eps[k], log_sigma[k], prior(k));
              });
            }
          }
          products.multiply(w, x_tile + chunk * kChunk + tile * kSide, at);
        }
      }
      at.sync_group();
    }
    __syncthreads();
  }

  int64_t all = problem.samples * problem.batch;
  float* sums = plan.sums + blockIdx.y * all * p.rows;
  products.finish(at, [&](int h, int b, float sum) {
    int64_t r = row + h * 8;
    if (at.member < problem.samples && b < problem.batch && r < p.rows)
      sums[(at.member * problem.batch + b) * p.rows + r] = sum;
  });
  if (problem.divergence == kNone) return;
  kl = block_sum(kl);
  if (threadIdx.x == 0) plan.kl[blockIdx.y * plan.tiles + blockIdx.x] = kl;
}

// Adds up the parts, and the bias. A thread owns four outputs of one row of x; the last block sums the KL.
__global__ void __launch_bounds__(kThreads) finish_kernel(LayerForward problem, ForwardPlan plan) {
  const Posterior& p = problem.bias;
  int64_t rows = problem.weight.rows, all = problem.samples * problem.batch;
  if (blockIdx.x == gridDim.x - 1) {
    double kl = 0;
    if (problem.divergence != kNone)
      for (int64_t i = threadIdx.x; i < plan.cut.parts * plan.tiles; i += kThreads) kl += plan.kl[i];
    kl = block_sum(kl);
    if (problem.divergence == kSampled) kl /= static_cast<double>(problem.samples);
    if (threadIdx.x == 0) *static_cast<float*>(problem.kl) = static_cast<float>(kl);
    return;
  }
  int64_t shift = problem.weight.row_offset & 3, quads = (shift + rows + 3) / 4;
  int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, n = thread / quads, counter = thread % quads;
  if (n >= all) return;
  float y[4] = {};
  Quad quad(all, rows, n, counter * 4 - shift);
  for (int64_t part = 0; part < plan.cut.parts; ++part) {
    float sum[4];
    load_quad<float>(plan.sums + part * all * rows, Type::kFloat32, quad, 0.0f, sum);
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) y[k] += sum[k];
  }
  if (p.mu) {
    Quad of_bias = quad_at(p, 0, counter);
    float mu[4], rho[4], eps[4];
    load_quad<float>(p.mu, p.type, of_bias, 0.0f, mu);
    load_quad<float>(p.rho, p.type, of_bias, -INFINITY, rho);
    QuadNoise(p).draw<float>(n / problem.batch, 0, counter, eps);
    with_scale(p.scale, [&]<int scale>() {
      BNN_UNROLL
      for (int k = 0; k < 4; ++k) y[k] += fma_lane(spread<scale>(rho[k]).sigma, eps[k], mu[k]);
    });
  }
  store_quad<float>(problem.y, problem.x_type, quad, y);
}

cudaError_t plan_forward(const LayerForward& problem, ForwardPlan& plan) {
  const Posterior& p = problem.weight;
  plan.prior = prior_of_numbers(p.prior);
  plan.aligned = all_aligned(p, {p.mu, p.rho, p.prior.loc_tensor, p.prior.scale_tensor});
  plan.members = members_for(problem.samples);
  plan.arrays = problem.divergence == kSampled ? 3 : 2;
  int64_t outputs = kWarps / plan.members * kSide;
  plan.tiles = (p.rows + outputs - 1) / outputs;
  plan.steps = static_cast<int>(((p.column_offset & 3) + p.columns + kStage - 1) / kStage);
  if (cudaError_t error = cut(plan.tiles, plan.steps, plan.cut)) return error;
  plan.kl = static_cast<double*>(problem.workspace);
  plan.sums = reinterpret_cast<float*>(plan.kl + plan.cut.parts * plan.tiles);
  return cudaSuccess;
}

// Of a block's shared memory.
template <Type type, int kBatch> size_t shared_bytes(const ForwardPlan& plan) {
  return kWarps / plan.members * plan.arrays * kChunkQuads * sizeof(float4) +
         2 * plan.members * kBatch * kStageStride<type> * sizeof(Stored<type>);
}

}  // namespace

extern "C" int64_t bnn_fast_cuda_linear_forward_workspace(const LayerForward* problem) {
  ForwardPlan plan;
  if (plan_forward(*problem, plan)) return 0;
  return plan.cut.parts * (plan.tiles * sizeof(double) + problem->samples * problem->batch * problem->weight.rows * sizeof(float));
}

extern "C" cudaError_t bnn_fast_cuda_linear_forward(const LayerForward* problem, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  ForwardPlan plan;
  if (cudaError_t error = plan_forward(*problem, plan)) return error;
  cudaError_t error = with_type_and_batch(problem->x_type, problem->batch, [&]<Type type, int kBatch>() {
    return launch_tiles(forward_kernel<type, kBatch>, *problem, plan, shared_bytes<type, kBatch>(plan), queue);
  });
  if (error) return error;
  int64_t quads = ((problem->weight.row_offset & 3) + problem->weight.rows + 3) / 4;
  int64_t blocks = (quads * problem->samples * problem->batch + kThreads - 1) / kThreads + 1;
  finish_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(*problem, plan);
  return cudaGetLastError();
}

}  // namespace bnn_fast
