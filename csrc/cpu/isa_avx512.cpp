// 16 lanes.
#include <cstdint>
#include <cstring>
#include <math.h>
#include <memory>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define BNN_FAST_ISA avx512
#define BNN_FAST_VECTOR_BITS 512
#include "isa.h"

namespace bnn_fast {
extern const CpuKernels kernels_avx512 = avx512::make_kernels<avx512::f32x16>("avx512");
}  // namespace bnn_fast

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
