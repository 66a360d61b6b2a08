// 16 lanes on pairs of AVX2 registers: the AVX-512 code path, testable without AVX-512.
#include <cstdint>
#include <cstring>
#include <math.h>
#include <memory>
#include <new>

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define BNN_FAST_ISA avx2x16
#define BNN_FAST_VECTOR_BITS 256
#include "isa.h"

namespace bnn_fast {
extern const CpuKernels kernels_avx2x16 = avx2x16::make_kernels<avx2x16::f32x16>("avx2x16");
}  // namespace bnn_fast
#endif
