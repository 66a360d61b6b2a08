// The rows of a drawn table that are looked up (../rows.h), one launch each way:
//
//   forward    w_i = mu_v + sigma(rho_v) eps(draw of i, v)     with v = rows[i]          KL = sum_i weight_i KL_v
//   backward   what each look-up adds to the gradients of its row (quad_gradient.cuh, of one draw)
//
// A thread takes quads of one look-up, neighbouring threads its neighbouring quads. Row numbers come from the user, and nobody
// waits for the device to check them: a row that the table has not is read nowhere. Its values are NaN, which nothing hides, it
// has no KL, and its gradient is 0, of row 0.
#include <cuda_runtime.h>

#include "quad_gradient.cuh"
#include "sample_rows.h"

namespace bnn_fast {
namespace {

constexpr unsigned kThreads = 256;
template <class F> constexpr int kBlocksPerProcessor = sizeof(F) == 4 ? 3 : 1;  // left to itself ptxas spills to have room for four

// How a block's threads share look-ups: so many, a power of two, take the quads of one.
struct Shares {
  unsigned across = 1;
  int64_t blocks;

  Shares(const Posterior& p, const LookUp& at) {
    while (across < kThreads && across < quads_in_row(p)) across *= 2;
    int64_t at_once = kThreads / across;
    blocks = (at.count + at_once - 1) / at_once;
  }
};

// A thread's look-up.
struct Place {
  int64_t i;       // its number
  bool some;       // whether there is one
  unsigned first;  // of its quads, every across-th is this thread's
  int64_t row;     // of the table
  bool there;      // whether the table has it

  __device__ Place(const LookUp& at, unsigned across)
      : i(int64_t(blockIdx.x) * (kThreads / across) + threadIdx.x / across), some(i < at.count), first(threadIdx.x % across),
        row(some ? at.rows[i] : 0), there(some && row >= 0 && row < at.table) {}
};

// Calls body(counter, quad of the look-up) for a thread's quads.
template <class Body>
__device__ __forceinline__ void for_quads(const Posterior& p, const Place& place, const LookUp& at, unsigned across, Body body) {
  if (!place.some) return;
  int64_t quads = quads_in_row(p);
  for (int64_t counter = place.first; counter < quads; counter += across)
    body(counter, Quad(at.count, p.columns, place.i, counter * 4 - (p.column_offset & 3)));
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<F>)
    rows_forward_kernel(const __grid_constant__ RowsForward problem, unsigned across) {
  const Posterior& p = problem.posterior;
  Place place(problem.at, across);
  int64_t draw = place.there ? problem.at.draw_of(place.i) : 0;
  double kl = 0;
  for_quads(p, place, problem.at, across, [&](int64_t counter, const Quad& to) {
    F w[4] = {NAN, NAN, NAN, NAN};
    if (place.there) {
      Quad from = quad_at(p, place.row, counter);
      F mu[4], rho[4], eps[4];
      load_quad<F>(p.mu, p.type, from, F(0), mu);
      load_quad<F>(p.rho, p.type, from, F(-INFINITY), rho);
      QuadNoise(p).normals(draw, place.row, counter, eps);
      with_scale(p.scale, [&]<int scale>() {
        BNN_UNROLL
        for (int k = 0; k < 4; ++k) w[k] = fma_lane(spread<scale>(rho[k]).sigma, eps[k], mu[k]);
      });
      if (problem.divergence != kNone) kl += quad_divergence<F>(p, problem.divergence, place.row, counter, draw, draw + 1, 1);
    }
    store_quad<F>(problem.weight, p.type, to, w);
  });
  if (!problem.kl) return;
  if (kl != 0) kl *= problem.at.weight_of(place.i);  // of a padding row that is not counted no 0 inf
  kl = block_sum(kl);
  if (threadIdx.x == 0) problem.kl[blockIdx.x] = kl;
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<F>)
    rows_backward_kernel(const __grid_constant__ RowsBackward problem, unsigned across) {
  const Posterior& p = problem.posterior;
  Place place(problem.at, across);
  int divergence = problem.grad_kl.data ? problem.divergence : int(kNone);
  int64_t draw = place.there ? problem.at.draw_of(place.i) : 0;
  F k = divergence == kNone ? F(0) : load_element<F>(problem.grad_kl.data, problem.grad_kl.type, 0);
  if (k != 0 && place.there) k = static_cast<F>(k * problem.at.weight_of(place.i));  // a KL of weight 0 adds nothing
  for_quads(p, place, problem.at, across, [&](int64_t counter, const Quad& to) {
    F by_mu[4] = {}, by_rho[4] = {};
    if (place.there)
      quad_gradient<F>(p, divergence, k, place.row, counter, draw, 1, [&](int64_t, F (&eps)[4], F (&grad)[4]) {
        QuadNoise(p).normals(draw, place.row, counter, eps);
        if (problem.grad_weight) load_quad<F>(problem.grad_weight, p.type, to, F(0), grad);
      }, by_mu, by_rho);
    store_quad<F>(problem.grad_mu, p.type, to, by_mu);
    store_quad<F>(problem.grad_rho, p.type, to, by_rho);
  });
  if (place.some && place.first == 0) problem.rows[place.i] = place.there ? place.row : 0;
}

template <class P> cudaError_t launch(void (*wide)(P, unsigned), void (*narrow)(P, unsigned), const P& problem, void* stream) {
  Shares shares(problem.posterior, problem.at);
  if (shares.blocks == 0) return cudaSuccess;
  auto* kernel = problem.posterior.type == Type::kFloat64 ? wide : narrow;
  kernel<<<static_cast<unsigned>(shares.blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(problem, shares.across);
  return cudaGetLastError();
}

}  // namespace

extern "C" int64_t bnn_fast_cuda_rows_blocks(const RowsForward* problem) { return Shares(problem->posterior, problem->at).blocks; }

extern "C" cudaError_t bnn_fast_cuda_rows_forward(const RowsForward* problem, void* stream) {
  return launch(rows_forward_kernel<double>, rows_forward_kernel<float>, *problem, stream);
}

extern "C" cudaError_t bnn_fast_cuda_rows_backward(const RowsBackward* problem, void* stream) {
  return launch(rows_backward_kernel<double>, rows_backward_kernel<float>, *problem, stream);
}

}  // namespace bnn_fast
