// Runs kernels over torch's threads. Work is cut by shape alone (problem.h), so results do not depend on their number.
#pragma once

#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../divergence.h"
#include "../tensors.h"
#include "kernels.h"

namespace bnn_fast {

// Weights that are worth a second thread. Measured on two cores with AVX2, drawing and its backward: 16,384 weights take on two
// threads 0.6 of the time on one, and beside two busy processes 0.3 to 0.8 (medians).
constexpr int64_t kGrainWeights = 8192;

// Whether fused layers take large batches, too: their products outrun torch's GEMM, and the threads are no more than the tasks that a middle-sized
// layer has for them.
inline bool fuses_large_batches() { return outruns_gemm() && torch::stable::get_num_threads() <= 8; }

// The same for batches somewhat above those that all processors have fused; a layer of 256 inputs has four tasks in the backward.
inline bool fuses_middle_batches() { return matches_gemm() && torch::stable::get_num_threads() <= 4; }

template <class Problem>
void run(void (*kernel)(const Problem&, int64_t, int64_t), const Problem& problem, int64_t tasks, int64_t weights_per_task) {
  int64_t grain = weights_per_task > 0 ? (kGrainWeights + weights_per_task - 1) / weights_per_task : tasks;
  if (tasks <= grain) return kernel(problem, 0, tasks);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

template <class Problem> void run_spans(void (*kernel)(const Problem&, int64_t, int64_t), const Problem& problem) {
  run(kernel, problem, Tasks(problem.posterior).count, Tasks::kElements);
}

inline double sum_of(const std::vector<double>& parts) {
  double sum = 0;
  for (double part : parts) sum += part;
  return sum;
}

// Draws weights (none if weight is null; problem.h says what other estimators write) and returns the sum of their KL, the mean over
// samples if it is sampled.
inline double sample(const Posterior& p, int64_t divergence, int64_t samples, void* weight, Type weight_type,
                     int estimator = kWeight, void* noise = nullptr) {
  std::vector<double> kl(divergence == kNone ? 0 : Tasks(p).count);
  run_spans(cpu_kernels().sample_forward, SampleForward{p, static_cast<int>(divergence), samples, weight, weight_type,
                                                        kl.empty() ? nullptr : kl.data(), estimator, noise});
  return sum_of(kl) / (divergence == kSampled ? static_cast<double>(samples) : 1.0);
}

// glibc's free gives the top of its heap back to the system where more than a threshold is free there, at first 128 KiB, and
// what is taken again comes with page faults: up to half of a backward's time. Freeing one block that was mapped by itself
// raises the threshold to twice its size, up to 64 MiB, for good; as any program does that once frees a large tensor.
inline void keep_freed_memory() {
#ifdef __GLIBC__
  static const bool done = [] {
    void* volatile block = malloc(size_t(31) << 20);  // volatile: the compiler would leave out both
    free(block);
    return true;
  }();
  (void)done;
#endif
}

// Fresh memory for a large result, in huge pages where the system offers them on request: faulting in small pages one by
// one takes longer than computing what is written to them.
inline Tensor empty_large(const Tensor& like, const Shape& shape, ScalarType dtype) {
  keep_freed_memory();
  Tensor t = empty_of(like, shape, dtype);
#ifdef __linux__
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  uintptr_t end = (begin + static_cast<uintptr_t>(t.numel() * size_of(type_of_tensor(t, "result")))) & ~(huge - 1);
  begin = (begin + huge - 1) & ~(huge - 1);
  if (end > begin + huge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

// x in the layout of the fused forward.
inline Tensor pack_input(const Tensor& x, const Posterior& p, int64_t rows) {
  bool wide = p.type == Type::kFloat64;
  int64_t lanes = wide ? 1 : cpu_kernels().lanes, shift = p.column_offset & 3;
  int64_t vectors = (shift + p.columns + 4 * lanes - 1) / (4 * lanes) * 4;
  Tensor packed = empty_of(x, {vectors, rows, lanes}, wide ? ScalarType::Double : ScalarType::Float);
  Pack problem{rows, p.columns, shift, type_of_tensor(x, "x"), wide, x.const_data_ptr(), packed.mutable_data_ptr()};
  run(cpu_kernels().pack, problem, vectors, rows * lanes);
  return packed;
}

// A sum as a tensor with no dimensions, in the type that like's KL has.
inline Tensor scalar_tensor(double value, const Tensor& like) {
  ScalarType type = compute_type(like.scalar_type());
  Tensor out = empty_of(like, {}, type);
  if (type == ScalarType::Double)
    *static_cast<double*>(out.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  return out;
}

}  // namespace bnn_fast
