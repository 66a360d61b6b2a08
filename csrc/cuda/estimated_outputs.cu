// What the estimators "local" and "flipout" do to activations, in either regime, a quad to a thread:
//
//   outputs    local: m = first + mu_b, v = second + sigma_b^2, y = m + sqrt(v) eps, kept = eps / sqrt(v), 0 where v is
//              flipout: y = first + r second + b
//   signs      of flipout: bits of a Philox counter's words, the lowest first, 128 columns to a counter (column / 128, example,
//              sample, stream); a set bit is -1
//
// Activations are seen as [samples, examples, columns], and their noise is counted so, from the example on that a part of a batch
// begins with.
#include <cuda_runtime.h>

#include "estimated.h"
#include "quad.cuh"

namespace bnn_fast {
namespace {

constexpr int kThreads = 256;

// A thread's quad of activations [samples, examples, columns].
struct ActivationQuad {
  int64_t sample, example, counter;
  Quad quad;

  __device__ ActivationQuad(int64_t samples, int64_t examples, int64_t columns)
      : ActivationQuad(samples, examples, columns, (columns + 3) / 4, int64_t(blockIdx.x) * kThreads + threadIdx.x) {}

 private:
  __device__ ActivationQuad(int64_t samples, int64_t examples, int64_t columns, int64_t quads, int64_t thread)
      : sample(thread / quads / examples),
        example(thread / quads % examples),
        counter(thread % quads),
        quad(samples * examples, columns, thread / quads, counter * 4) {}
};

// Of a key: the seed, and where its samples and examples begin.
struct Counted {
  PhiloxKey seed;
  uint32_t first_sample, first_row;

  __device__ Counted(const int64_t* key, bool has_row)
      : seed{static_cast<uint32_t>(key[0]), static_cast<uint32_t>(static_cast<uint64_t>(key[0]) >> 32)},
        first_sample(static_cast<uint32_t>(key[1])),
        first_row(has_row ? static_cast<uint32_t>(key[2]) : 0) {}

  // The signs of a quad, as bits from the lowest on.
  __device__ uint32_t signs(const ActivationQuad& at, uint32_t stream) const {
    uint32_t words[1][4] = {{static_cast<uint32_t>(at.counter / 32), first_row + static_cast<uint32_t>(at.example),
                             first_sample + static_cast<uint32_t>(at.sample), stream}};
    philox(words, seed);
    uint32_t bits = 0;
    BNN_UNROLL
    for (int w = 0; w < 4; ++w) bits = at.counter / 8 % 4 == w ? words[0][w] : bits;
    return bits >> at.counter % 8 * 4;
  }

  template <class F> __device__ void normals(const ActivationQuad& at, F (&eps)[4]) const {
    const uint32_t rows[] = {first_row + static_cast<uint32_t>(at.example)}, columns[] = {static_cast<uint32_t>(at.counter)};
    F normal[1][4];
    draw_normals<F>(Noise<PhiloxKey>{seed, kOutputNoise}, first_sample + static_cast<uint32_t>(at.sample), rows, columns, normal);
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) eps[k] = normal[0][k];
  }
};

template <class F> __global__ void __launch_bounds__(kThreads) outputs_kernel(EstimatedOutputs problem) {
  ActivationQuad at(problem.samples, problem.examples, problem.columns);
  if (at.sample >= problem.samples) return;
  bool local = problem.estimator == kLocal;
  F first[4] = {}, second[4] = {};
  BNN_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (!at.quad.inside(k)) continue;
    int64_t column = at.counter * 4 + k, output = column % problem.outputs;
    int64_t row = at.example * (problem.columns / problem.outputs) + column / problem.outputs;  // of one sample
    int64_t from = (problem.shared ? row : at.sample * problem.batch + row) * problem.row_stride + output * problem.output_stride;
#pragma unroll 1
    for (int64_t part = 0; part < problem.parts; ++part, from += problem.part_stride) {
      first[k] += static_cast<const F*>(problem.first)[from];
      second[k] += static_cast<const F*>(problem.second)[from];
    }
    if (!problem.bias) continue;
    first[k] += static_cast<const F*>(problem.bias)[local ? output : at.sample * problem.outputs + output];
    if (local) second[k] += static_cast<const F*>(problem.bias_variance)[output];
  }
  Counted noise(problem.key, problem.key_has_row);
  F y[4];
  if (local) {
    F eps[4], kept[4];
    noise.normals<F>(at, eps);
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) {
      bool none = second[k] < (sizeof(F) == 8 ? F(2.2250738585072014e-308) : F(1.17549435e-38));  // or roots of what has few digits
      F root = sqrt(none ? F(1) : second[k]);
      kept[k] = none ? F(0) : eps[k] / root;
      y[k] = none ? first[k] : fma_lane(root, eps[k], first[k]);
    }
    store_quad<F>(problem.kept, kTypeOf<F>, at.quad, kept);
  } else {
    uint32_t signs = noise.signs(at, kOutputSigns);
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) y[k] = first[k] + (signs >> k & 1 ? -second[k] : second[k]);
  }
  store_quad<F>(problem.y, problem.y_type, at.quad, y);
}

template <class F> __global__ void __launch_bounds__(kThreads) signs_kernel(Signs problem) {
  ActivationQuad at(problem.samples, problem.examples, problem.columns);
  if (at.sample >= problem.samples) return;
  uint32_t signs = Counted(problem.key, problem.key_has_row).signs(at, problem.stream);
  F values[4] = {1, 1, 1, 1};
  if (problem.from) load_quad<F>(problem.from, kTypeOf<F>, at.quad, F(0), values);
  BNN_UNROLL
  for (int k = 0; k < 4; ++k)
    if (signs >> k & 1) values[k] = -values[k];
  store_quad<F>(problem.to, kTypeOf<F>, at.quad, values);
}

template <class Problem> cudaError_t launch(void (*kernel)(Problem), const Problem& problem, void* stream) {
  int64_t quads = problem.samples * problem.examples * ((problem.columns + 3) / 4), blocks = (quads + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(problem);
  return cudaGetLastError();
}

}  // namespace

extern "C" cudaError_t bnn_fast_cuda_estimated_outputs(const EstimatedOutputs* problem, void* stream) {
  return launch(problem->type == Type::kFloat64 ? outputs_kernel<double> : outputs_kernel<float>, *problem, stream);
}

extern "C" cudaError_t bnn_fast_cuda_signs(const Signs* problem, void* stream) {
  return launch(problem->type == Type::kFloat64 ? signs_kernel<double> : signs_kernel<float>, *problem, stream);
}

}  // namespace bnn_fast
