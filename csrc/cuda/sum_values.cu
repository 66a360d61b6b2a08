// The sum of a few numbers that lie in tensors of their own.
//
//   out = v_0 + v_1 + ...   in this order, in float64
//
// What counts is the launch, not the work: one thread adds numbers whose addresses come with the launch, as many as have room there;
// every further launch goes on from what the one before it wrote, rounded to the numbers' type.
//
// And the sum of the parts that a kernel's blocks have left in one array, by one block.
#include <cuda_runtime.h>

#include "quad.cuh"
#include "sum_values.h"

namespace bnn_fast {
namespace {

constexpr int kMany = 64, kThreads = 256;

struct Values {
  const void* at[kMany];
  int count;
};

template <class T> __global__ void sum_values_kernel(Values values, T* out) {
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kMany; ++i)  // indices known to the compiler, so that the addresses stay where the launch put them
    if (i < values.count) sum += *static_cast<const T*>(values.at[i]);
  *out = static_cast<T>(sum);
}

template <class T> cudaError_t launch(const void* const* values, int64_t count, void* out, cudaStream_t stream) {
  for (int64_t next = 0; next < count;) {
    Values some{};
    if (next > 0) some.at[some.count++] = out;
    while (some.count < kMany && next < count) some.at[some.count++] = values[next++];
    sum_values_kernel<T><<<1, 1, 0, stream>>>(some, static_cast<T*>(out));
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* parts, int64_t count, double factor, void* out, Type type) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += parts[i];
  sum = block_sum(sum) * factor;
  if (threadIdx.x > 0) return;
  if (type == Type::kFloat64)
    *static_cast<double*>(out) = sum;
  else
    *static_cast<float*>(out) = static_cast<float>(sum);
}

}  // namespace

extern "C" cudaError_t bnn_fast_cuda_sum_values(const void* const* values, int64_t count, Type type, void* out, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  return type == Type::kFloat64 ? launch<double>(values, count, out, queue) : launch<float>(values, count, out, queue);
}

extern "C" cudaError_t bnn_fast_cuda_sum(const double* parts, int64_t count, double factor, void* out, Type type,
                                         void* stream) {
  sum_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(parts, count, factor, out, type);
  return cudaGetLastError();
}

}  // namespace bnn_fast
