// sample_normal and kl_normal on the CPU. Operators: ../sample_normal.h. Kernels: sample.h.
#include "../sample_normal.h"
#include "launch.h"

namespace bnn_fast {
namespace {

struct Cpu {
  Cpu(const Tensor&, const char*) {}
  Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) const {
    return empty_large(like, shape, dtype);
  }
  Tensor sample(const Posterior& p, int64_t divergence, int64_t samples, void* weight, Type type,
                const Tensor& like) const {
    return scalar_tensor(bnn_fast::sample(p, divergence, samples, weight, type), like);
  }
  void backward(const SampleBackward& problem) const { run_spans(cpu_kernels().sample_backward, problem); }
  void kl_elements(const KlElements& problem) const { run_spans(cpu_kernels().kl_elements, problem); }
};

using Operators = SampleNormal<Cpu>;

}  // namespace
}  // namespace bnn_fast

STABLE_TORCH_LIBRARY_IMPL(bnn_fast, CPU, m) {
  m.impl("_sample_normal", TORCH_BOX(&bnn_fast::Operators::forward));
  m.impl("_sample_normal_backward", TORCH_BOX(&bnn_fast::Operators::backward));
  m.impl("_kl_normal", TORCH_BOX(&bnn_fast::Operators::divergence));
  m.impl("_kl_normal_backward", TORCH_BOX(&bnn_fast::Operators::divergence_backward));
}
