// 16 lanes.
#include <cstdint>
#include <cstring>
#include <math.h>
#include <memory>
#include <new>

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define BNN_FAST_ISA avx512
#define BNN_FAST_VECTOR_BITS 512
#include "isa.h"

namespace bnn_fast {
extern const CpuKernels kernels_avx512 = avx512::make_kernels<avx512::f32x16>("avx512");
}  // namespace bnn_fast
#endif
