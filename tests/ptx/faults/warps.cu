// Each kernel uses an instruction of a whole warp where some of its lanes are elsewhere, if `faulty` is set.
// Launched with 32 threads, out [32].
extern "C" __global__ void shuffle_in_branch(float* out, int faulty) {
  float value = threadIdx.x;
  if (!faulty || threadIdx.x < 16) value = __shfl_xor_sync(0xffffffff, value, 1);  // fault: shuffle_in_branch
  out[threadIdx.x] = value;
}

extern "C" __global__ void shuffle_from_absent_lane(float* out, int faulty) {
  float value = threadIdx.x;
  int source = threadIdx.x + 8 * faulty;
  if (threadIdx.x < 16) value = __shfl_sync(0xffff, value, source);  // fault: shuffle_from_absent_lane
  out[threadIdx.x] = value;
}

extern "C" __global__ void vote_with_a_lane_too_many(float* out, int faulty) {
  float value = 0;
  bool odd = threadIdx.x & 1;
  if (threadIdx.x < 16 + faulty) value = __ballot_sync(0xffff, odd);  // fault: vote_with_a_lane_too_many
  out[threadIdx.x] = value;
}

extern "C" __global__ void matrix_in_branch(float* out, int faulty) {
  unsigned a[2] = {0, 0}, b = 0;
  float d[4] = {0, 0, 0, 0};
  if (!faulty || threadIdx.x < 16)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));  // fault: matrix_in_branch
  out[threadIdx.x] = d[0];
}

extern "C" __global__ void matrix_load_in_branch(float* out, int faulty) {
  __shared__ alignas(16) unsigned tile[32];
  tile[threadIdx.x] = threadIdx.x;
  __syncwarp();
  unsigned word = 0, row = static_cast<unsigned>(__cvta_generic_to_shared(tile + 4 * (threadIdx.x & 7)));
  if (!faulty || threadIdx.x != 31)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(word)
                 : "r"(row));  // fault: matrix_load_in_branch
  out[threadIdx.x] = word;
}
