// Any processor: one lane, the C library's fma.
#include <cstdint>
#include <cstring>
#include <math.h>
#include <memory>
#include <new>
#define BNN_FAST_ISA generic
#define BNN_FAST_VECTOR_BITS 0
#include "isa.h"

namespace bnn_fast {
extern const CpuKernels kernels_generic = generic::make_kernels<float>("generic");
}  // namespace bnn_fast
