// Each kernel does something wrong with global memory where `faulty` is set, at the line with its name.
// Launched with 3 blocks of 64 threads; in and out are [192], `in` read-only, `out` uninitialised.

extern "C" __global__ void global_out_of_bounds(const float* in, float* out, int faulty) {
  int i = blockIdx.x * 64 + threadIdx.x + faulty;
  out[i] = in[i - faulty];  // fault: global_out_of_bounds
}

extern "C" __global__ void read_out_of_bounds(const float* in, float* out, int faulty) {
  int i = blockIdx.x * 64 + threadIdx.x;
  out[i] = in[i - faulty];  // fault: read_out_of_bounds
}

extern "C" __global__ void global_misaligned(const float* in, float* out, int faulty) {
  int i = blockIdx.x * 64 + threadIdx.x;
  float2 pair = reinterpret_cast<const float2*>(in + faulty)[i / 4];  // fault: global_misaligned
  out[i] = pair.x + pair.y;
}

extern "C" __global__ void global_unwritten(const float* in, float* out, int faulty) {
  int i = blockIdx.x * 64 + threadIdx.x;
  if (!faulty) out[i] = in[i];
  out[i] += 1;  // fault: global_unwritten
}

extern "C" __global__ void write_to_constant(const float* in, float* out, int faulty) {
  int i = blockIdx.x * 64 + threadIdx.x;
  float* target = faulty ? const_cast<float*>(in) : out;
  target[i] = 1;  // fault: write_to_constant
}

extern "C" __global__ void blocks_write_alike(const float* in, float* out, int faulty) {
  int i = (faulty ? 0 : blockIdx.x * 64) + threadIdx.x;
  out[i] = in[i];  // fault: blocks_write_alike
}

extern "C" __global__ void block_reads_what_another_writes(const float* in, float* out, int faulty) {
  int i = blockIdx.x * 64 + threadIdx.x;
  out[i] = in[i];
  __syncthreads();
  float other = out[blockIdx.x == 1 && faulty ? i - 64 : i ^ 32];  // fault: block_reads_what_another_writes
  __syncthreads();
  out[i] = other;
}

extern "C" __global__ void threads_exchange(const float* in, float* out, int faulty) {
  int i = blockIdx.x * 64 + threadIdx.x;
  out[i] = in[i];
  if (!faulty) __syncthreads();
  float other = out[i ^ 32];  // fault: threads_exchange
  __syncthreads();
  out[i] = other;
}

extern "C" __global__ void atomics_meet(const float* in, float* out, int faulty) {
  int i = blockIdx.x * 64 + threadIdx.x;
  if (i == 0) out[0] = in[0];
  if (i == 0 || faulty) atomicAdd(out, 1.0f);  // fault: atomics_meet
}
