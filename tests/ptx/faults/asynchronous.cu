// Each kernel uses what cp.async copies too early where `faulty` is set, or copies what it should not.
// Launched with 64 threads; in and out are [256].
#include <cuda_pipeline.h>

extern "C" __global__ void copy_without_wait(const float* in, float* out, int faulty) {
  __shared__ alignas(16) float tile[64];
  __pipeline_memcpy_async(tile + threadIdx.x, in + threadIdx.x, 4);
  __pipeline_commit();
  if (!faulty) __pipeline_wait_prior(0);
  out[threadIdx.x] = tile[threadIdx.x];  // fault: copy_without_wait
}

extern "C" __global__ void copy_without_barrier(const float* in, float* out, int faulty) {
  __shared__ alignas(16) float tile[256];
  __pipeline_memcpy_async(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  if (!faulty) __syncthreads();
  out[threadIdx.x] = tile[255 - threadIdx.x];  // fault: copy_without_barrier
}

extern "C" __global__ void one_group_too_few(const float* in, float* out, int faulty) {
  __shared__ alignas(16) float tile[2][64];
  for (int stage = 0; stage < 2; ++stage) {
    __pipeline_memcpy_async(tile[stage] + threadIdx.x, in + 64 * stage + threadIdx.x, 4);
    __pipeline_commit();
  }
  float sum = 0;
  for (int step = 0; step < 4; ++step) {
    if (faulty && step == 3) __pipeline_wait_prior(1);
    else if (step == 3) __pipeline_wait_prior(0);
    else __pipeline_wait_prior(1);
    __syncthreads();
    sum += tile[step % 2][threadIdx.x ^ 32];  // fault: one_group_too_few
    __syncthreads();
    if (step < 2) {
      __pipeline_memcpy_async(tile[step % 2] + threadIdx.x, in + 64 * (step + 2) + threadIdx.x, 4);
      __pipeline_commit();
    }
  }
  out[threadIdx.x] = sum;
}

extern "C" __global__ void copy_over_what_is_read(const float* in, float* out, int faulty) {
  __shared__ alignas(16) float tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  float other = tile[threadIdx.x ^ 32];
  if (!faulty) __syncthreads();
  __pipeline_memcpy_async(tile + threadIdx.x, in + 64 + threadIdx.x, 4);  // fault: copy_over_what_is_read
  __pipeline_commit();
  __pipeline_wait_prior(0);
  out[threadIdx.x] = other + tile[threadIdx.x];
}

extern "C" __global__ void copy_from_beyond(const float* in, float* out, int faulty) {
  __shared__ alignas(16) float tile[256];
  const float* source = in + 4 * (threadIdx.x + faulty);
  __pipeline_memcpy_async(tile + 4 * threadIdx.x, source, 16);  // fault: copy_from_beyond
  __pipeline_commit();
  __pipeline_wait_prior(0);
  out[threadIdx.x] = tile[4 * threadIdx.x];
}
