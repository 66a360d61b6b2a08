// 8 lanes.
#include <cstdint>
#include <cstring>
#include <math.h>
#include <memory>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define BNN_FAST_ISA avx2
#define BNN_FAST_VECTOR_BITS 256
#include "isa.h"

namespace bnn_fast {
extern const CpuKernels kernels_avx2 = avx2::make_kernels<avx2::f32x8>("avx2");
}  // namespace bnn_fast

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
