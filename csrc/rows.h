// What crosses to the kernels that draw the rows of a table that are looked up, and no others: cpu/rows.h, cuda/sample_rows.cu. Each
// is drawn where it stands, as often as it is asked for: nothing is sorted, and nothing of the table's size is made.
#pragma once

#include "lane.h"
#include "problem.h"

namespace bnn_fast {

// What is asked for. Of count rows, of a table of so many.
struct LookUp {
  const int64_t* rows;   // [count]: which of the table's
  const int64_t* draws;  // [count]: the draw that each is of, below 0 for one that no KL counts; null: of each draw per_draw
  int64_t count, per_draw, table;
  // The KL of a row counts weight / counts[row] every time that it is looked up.
  double weight;
  const int64_t* counts;  // [table], or null for 1 each

  BNN_FN int64_t draw_of(int64_t i) const { return draws ? draws[i] : i / per_draw; }
  BNN_FN double weight_of(int64_t i) const {
    if (draws && draws[i] < 0) return 0;
    return counts ? weight / static_cast<double>(counts[rows[i]]) : weight;
  }
};

// The rows that are asked for as a tensor of their own, by which they are cut into tasks and spans.
BNN_FN Posterior looked_up(const Posterior& table, const LookUp& at) {
  Posterior p = table;
  p.rows = at.count;
  return p;
}

struct RowsForward {
  Posterior posterior;  // of the whole table
  LookUp at;
  int divergence;
  void* weight;  // [count, columns], the posterior's type
  double* kl;    // each task's or block's part of the KLs' sum; null without a divergence
  void* noise;   // eps beside the weight, [count, columns] in the type computed in; or null. On the CPU alone
};

struct RowsBackward {
  Posterior posterior;
  LookUp at;
  int divergence;
  const void* grad_weight;  // [count, columns], or null
  KlGradient grad_kl;       // a number
  void* grad_mu;            // [count, columns]: what each look-up adds to the gradient of its row
  void* grad_rho;
  const void* noise;        // as the forward has left it; null: drawn again
  int64_t* rows;            // [count]: the row that it is added to; null: the one looked up. On CUDA alone
};

// The gradients of the whole table, from what each look-up adds to them. On the CPU alone.
struct RowsAdded {
  LookUp at;
  int64_t columns;
  Type type;
  const void* values[2];  // [count, columns]: by mu, by rho
  void* sums[2];          // [table, columns]

  // A task has so many of the table's rows: there are few, as each looks through all that are asked for.
  BNN_FN int64_t rows_per_task() const { return (at.table + 15) / 16; }
};

}  // namespace bnn_fast
