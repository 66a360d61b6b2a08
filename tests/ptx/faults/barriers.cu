// Each kernel has a barrier that not all threads reach, or that orders too little, where `faulty` is set.
// Launched with 96 threads, out [96].
#define BARRIER(id, count) asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(count) : "memory")
#define ARRIVE(id, count) asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(count) : "memory")

extern "C" __global__ void barrier_in_branch(float* out, int faulty) {
  if (threadIdx.x < (faulty ? 32 : 96)) __syncthreads();  // fault: barrier_in_branch
  out[threadIdx.x] = 1;
}

extern "C" __global__ void exit_before_barrier(float* out, int faulty) {
  if (faulty && threadIdx.x > 90) return;
  __syncthreads();  // fault: exit_before_barrier
  out[threadIdx.x] = 1;
}

extern "C" __global__ void barriers_at_two_places(float* out, int faulty) {
  __shared__ int mark[2];
  if (faulty && threadIdx.x < 32) {
    mark[0] = 1;
    __syncthreads();
    out[threadIdx.x] = mark[0];
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();  // fault: barriers_at_two_places
  }
}

extern "C" __global__ void named_barrier_of_others(float* out, int faulty) {
  __shared__ float tile[96];
  tile[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 64) BARRIER(1, 64);
  if (!faulty) BARRIER(2, 96);
  out[threadIdx.x] = tile[(threadIdx.x + 32) % 96];  // fault: named_barrier_of_others
}

extern "C" __global__ void named_barrier_from_two_places(float* out, int faulty) {
  __shared__ float tile[96];
  tile[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 32) {
    BARRIER(3, 96);
    out[threadIdx.x] = tile[threadIdx.x + 32];
  } else if (!faulty) {
    BARRIER(3, 96);
    out[threadIdx.x] = tile[threadIdx.x - 32];
  } else {
    BARRIER(3, 64);  // fault: named_barrier_from_two_places
  }
}

extern "C" __global__ void named_barrier_chain(float* out, int faulty) {  // 0 -> 1 -> 2: order is passed on
  __shared__ float tile[32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) tile[lane] = lane;
  if (warp < 2 && !(faulty && warp == 0)) BARRIER(1, faulty ? 32 : 64);
  if (warp > 0) BARRIER(2, 64);
  if (warp == 2) out[lane] = tile[31 - lane];  // fault: named_barrier_chain
}

extern "C" __global__ void producer_and_consumer(float* out, int faulty) {
  __shared__ float tile[32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) tile[lane] = 0;
  __syncthreads();
  if (warp == 0) {
    if (faulty) ARRIVE(1, 64);
    tile[lane] = lane;  // fault: producer_and_consumer
    if (!faulty) ARRIVE(1, 64);
  } else if (warp == 1) {
    BARRIER(1, 64);
    out[lane] = tile[lane];
  }
}
