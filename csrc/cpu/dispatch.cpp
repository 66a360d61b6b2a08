// Chooses the kernels for this processor, once. BNN_FAST_CPU=generic|avx2|avx512|avx2x16 forces one.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace bnn_fast {

extern const CpuKernels kernels_generic;
#if defined(__x86_64__)
extern const CpuKernels kernels_avx2, kernels_avx512, kernels_avx2x16;
#endif

namespace {

const CpuKernels& choose() {
  const char* forced = std::getenv("BNN_FAST_CPU");
  std::string wanted = forced ? forced : "";
#if defined(__x86_64__)
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return kernels_avx512;
  if (has_avx2 && (wanted.empty() || wanted == "avx2")) return kernels_avx2;
  if (has_avx2 && wanted == "avx2x16") return kernels_avx2x16;
#endif
  if (wanted.empty() || wanted == "generic") return kernels_generic;
  throw std::runtime_error("BNN_FAST_CPU is '" + wanted +
                           "', expected generic, avx2, avx512 or avx2x16, and one that this processor supports");
}

#if defined(__x86_64__)
// The processor's family, as its maker numbers them: 0x1a is Zen 5.
unsigned family() {
  unsigned signature = 0, b, c, d;
  __get_cpuid(1, &signature, &b, &c, &d);
  unsigned base = signature >> 8 & 15;
  return base == 15 ? base + (signature >> 20 & 255) : base;
}
#endif

}  // namespace

bool matches_gemm() {
#if defined(__x86_64__)
  static const bool found = &cpu_kernels() == &kernels_avx512 && __builtin_cpu_is("amd");
  return found;
#else
  return false;
#endif
}

bool outruns_gemm() {
#if defined(__x86_64__)
  static const bool found = matches_gemm() && family() >= 0x1a;
  return found;
#else
  return false;
#endif
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

const char* cpu_capability() { return cpu_kernels().name; }

}  // namespace bnn_fast
