// Work on the elements and rows of activations, cut over torch's threads by shape alone.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.h"

namespace bnn_fast {

constexpr int64_t kGrain = 1 << 15;      // elements that are worth a second thread
constexpr int64_t kRowsOfSum = 1 << 10;  // rows that a sum over a batch takes at a time

// body(begin, end) for parts of [0, count).
template <class Body> void for_each(int64_t count, int64_t grain, Body body) {
  if (count <= grain) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

// body(row) for rows of so many columns.
template <class Body> void for_rows(int64_t rows, int64_t columns, Body body) {
  for_each(rows, 1 + kGrain / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// The sums over the rows of [parts, rows, columns], in double.
template <class T> std::vector<T> sums_over_rows(const T* from, int64_t parts, int64_t rows, int64_t columns) {
  int64_t blocks = (rows + kRowsOfSum - 1) / kRowsOfSum;
  std::vector<double> sums(parts * blocks * columns);
  for_rows(parts * blocks, kRowsOfSum * columns, [&](int64_t t) {
    int64_t first = t % blocks * kRowsOfSum, last = std::min(rows, first + kRowsOfSum);
    for (int64_t row = first; row < last; ++row)
      for (int64_t c = 0; c < columns; ++c) sums[t * columns + c] += from[(t / blocks * rows + row) * columns + c];
  });
  std::vector<T> all(parts * columns);
  for (int64_t i = 0; i < parts * columns; ++i) {
    double sum = 0;
    for (int64_t t = 0; t < blocks; ++t) sum += sums[(i / columns * blocks + t) * columns + i % columns];
    all[i] = static_cast<T>(sum);
  }
  return all;
}

}  // namespace bnn_fast
