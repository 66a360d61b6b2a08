// The table of CPU kernels. Each instruction set fills one (isa_*.cpp); dispatch.cpp chooses.
#pragma once

#include "../problem.h"
#include "../rows.h"

namespace bnn_fast {

// Kernels work on tasks [begin, end), so that the caller can spread them over torch's threads.
struct CpuKernels {
  const char* name;
  int lanes;  // floats in a vector, the innermost extent of packed activations (doubles are always packed by one)
  void (*sample_forward)(const SampleForward&, int64_t begin, int64_t end);    // tasks: Tasks(posterior)
  void (*sample_backward)(const SampleBackward&, int64_t begin, int64_t end);  // tasks: Tasks(posterior)
  void (*rows_forward)(const RowsForward&, int64_t begin, int64_t end);        // tasks: Tasks(count, posterior's columns)
  void (*rows_backward)(const RowsBackward&, int64_t begin, int64_t end);      // tasks: Tasks(count, posterior's columns)
  void (*rows_added)(const RowsAdded&, int64_t begin, int64_t end);            // tasks: of rows_per_task rows of the table
  void (*kl_elements)(const KlElements&, int64_t begin, int64_t end);          // tasks: Tasks(posterior)
  void (*pack)(const Pack&, int64_t begin, int64_t end);                       // tasks: vectors
  void (*linear_forward)(const LinearForward&, int64_t begin, int64_t end);    // tasks: kOutputsPerTask outputs
  void (*linear_backward)(const LinearBackward&, int64_t begin, int64_t end);  // tasks: blocks of column_block inputs
  void (*estimated_forward)(const EstimatedForward&, int64_t begin, int64_t end);    // as linear_forward
  void (*estimated_backward)(const EstimatedBackward&, int64_t begin, int64_t end);  // tasks: rows_per_task outputs
  void (*local_outputs)(const LocalOutputs&, int64_t begin, int64_t end);            // tasks: Tasks(posterior)
  void (*chain_forward)(const ChainForward&, int64_t begin, int64_t end);    // tasks: ChainTasks(kMostRows)
  void (*chain_backward)(const ChainBackward&, int64_t begin, int64_t end);  // tasks: ChainTasks(kMostRows)
  // Null where there are no vectors.
  void (*narrow_forward)(const NarrowForward&, int64_t begin, int64_t end);    // tasks: NarrowTasks
  void (*narrow_backward)(const NarrowBackward&, int64_t begin, int64_t end);  // tasks: NarrowTasks
};

constexpr int64_t kOutputsPerTask = 8;

// Columns in a task of the backward, a multiple of 64: narrow enough for eight tasks where that is possible, wide enough to
// stream and to draw 128 at a time (8 to 16 % less time than with half of it, at 1024 to 2048 columns).
inline int64_t column_block(int64_t columns) {
  int64_t block = columns / 8 / 64 * 64;
  return block < 64 ? 64 : block > 256 ? 256 : block;
}

const CpuKernels& cpu_kernels();

// Whether products here outrun torch's GEMM. On AMD's processors MKL keeps to vectors of 256 bits, and from Zen 5 on those of
// 512 have twice their rate: measured on one, a thread's GEMM 110 GFLOP/s, products here 130 to 230.
bool outruns_gemm();

// Whether they have at least its rate: on AMD's processors with vectors of 512 bits.
bool matches_gemm();

}  // namespace bnn_fast
