// Each kernel does something wrong with shared memory where `faulty` is set, at the line with its name.
// Launched with 64 threads, 256 bytes of dynamic shared memory, and out [64].
extern __shared__ float dynamic[];

extern "C" __global__ void read_before_barrier(float* out, int faulty) {
  __shared__ float tile[64];
  tile[threadIdx.x] = threadIdx.x;
  if (!faulty) __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];  // fault: read_before_barrier
}

extern "C" __global__ void overwrite_before_barrier(float* out, int faulty) {
  __shared__ float tile[64];
  float sum = 0;
  for (int step = 0; step < 3; ++step) {
    tile[threadIdx.x] = threadIdx.x + step;  // fault: overwrite_before_barrier
    __syncthreads();
    sum += tile[threadIdx.x ^ 32];
    if (!faulty) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

extern "C" __global__ void one_reader_of_many(float* out, int faulty) {
  __shared__ float tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float sum = tile[0];  // all threads, the second warp twice, and one thread of it writes next
  __syncwarp();
  if (threadIdx.x >= 32) sum += *static_cast<volatile float*>(tile);
  __syncwarp();
  if (!faulty) __syncthreads();
  if (threadIdx.x == 63) tile[0] = 1;  // fault: one_reader_of_many
  out[threadIdx.x] = sum;
}

extern "C" __global__ void read_before_syncwarp(float* out, int faulty) {
  __shared__ float tile[64];
  tile[threadIdx.x] = threadIdx.x;
  if (!faulty) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];  // fault: read_before_syncwarp
}

extern "C" __global__ void syncwarp_of_other_lanes(float* out, int faulty) {
  __shared__ float tile[64];
  int pair = threadIdx.x & 30;
  tile[threadIdx.x] = threadIdx.x;
  if (threadIdx.x & 2) __syncwarp(0xcccccccc);
  else __syncwarp(0x33333333);
  out[threadIdx.x] = tile[(threadIdx.x & 32) + (faulty ? pair ^ 2 : pair)];  // fault: syncwarp_of_other_lanes
}

extern "C" __global__ void syncwarp_across_warps(float* out, int faulty) {
  __shared__ float tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ (faulty ? 32 : 1)];  // fault: syncwarp_across_warps
}

extern "C" __global__ void same_cell(float* out, int faulty) {
  __shared__ float tile[64];
  tile[faulty ? threadIdx.x / 2 : threadIdx.x] = threadIdx.x;  // fault: same_cell
  __syncthreads();
  out[threadIdx.x] = tile[faulty ? 0 : threadIdx.x];
}

extern "C" __global__ void neighbouring_bytes(float* out, int faulty) {
  __shared__ unsigned char tile[64];
  tile[threadIdx.x] = threadIdx.x;
  if (!faulty) __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];  // fault: neighbouring_bytes
}

extern "C" __global__ void unwritten(float* out, int faulty) {
  __shared__ float tile[65];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + faulty];  // fault: unwritten
}

extern "C" __global__ void shared_out_of_bounds(float* out, int faulty) {
  dynamic[threadIdx.x + faulty] = threadIdx.x;  // fault: shared_out_of_bounds
  out[threadIdx.x] = dynamic[threadIdx.x + faulty];
}

extern "C" __global__ void shared_misaligned(float* out, int faulty) {
  dynamic[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float2 pair = reinterpret_cast<float2*>(dynamic + faulty)[threadIdx.x / 4];  // fault: shared_misaligned
  out[threadIdx.x] = pair.x + pair.y;
}

extern "C" __global__ void atomic_against_plain(float* out, int faulty) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  if (!faulty) __syncthreads();
  out[threadIdx.x] = count;  // fault: atomic_against_plain
}
