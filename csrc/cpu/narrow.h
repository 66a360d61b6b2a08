// The variational linear layer of few inputs and outputs, whatever the batch: a sample's weights fit into the L1 cache, so
// they are drawn once (sample.h) and the products are formed straight from the caller's rows, nothing packed or padded.
//
//   forward    y_s[b] = bias_s + sum_i x_s[b, i] w_s[:, i]
//   backward   dx_s[b] = sum_o g_s[b, o] w_s[o, :],   dW_s[:, i] = sum_b x_s[b, i] g_s[b],   dbias_s = sum_b g_s[b]
//
// Two products serve both: add_rows (y and dx) and outer_rows (dW), with vectors along the rows of the result. Of the vectors
// that a row of n is cut into, the last ends with the row and so overlaps the one before it. A row shorter than a vector is
// read and written beyond its end, into the rows that follow: what is read there is not used, and what is written there these
// rows write over. Where no more rows follow (vectors_fit) a copy takes their place. Where a result has one column, vectors run along
// the sum instead (dot_rows), and dW is formed as its transpose.
#pragma once

#include "span.h"

#include "kernels.h"

BNN_FAST_BEGIN

constexpr int64_t kRowsPerSum = 64;  // of the batch: dW is summed in registers over so many

// Where vector v of a row of n begins.
template <class F> BNN_FN int64_t column_of(int64_t v, int64_t n) {
  constexpr int W = Lane<F>::width;
  return (v + 1) * W <= n ? v * W : n > W ? n - W : 0;
}

template <class F> BNN_FN int64_t vectors_of(int64_t n) { return (n + Lane<F>::width - 1) / Lane<F>::width; }

// Whether the vectors of `rows` rows of n end within the `elements` that there are from the first row on.
template <class F> BNN_FN bool vectors_fit(int64_t rows, int64_t n, int64_t elements) {
  return n >= Lane<F>::width || (rows - 1) * n + Lane<F>::width <= elements;
}

inline void copy_floats(float* to, const float* from, int64_t n) {
  if (n > 0) memcpy(to, from, sizeof(float) * static_cast<size_t>(n));  // not even of nothing from null
}

// Calls body.operator()<V>(v) for all vectors of a row of n, two at a time.
template <class F, class Body> BNN_FN void for_vectors(int64_t n, Body body) {
  int64_t v = 0, vectors = vectors_of<F>(n);
  for (; v + 2 <= vectors; v += 2) body.template operator()<2>(v);
  if (v < vectors) body.template operator()<1>(v);
}

// B rows of add_rows, V vectors of each.
template <class F, int B, int V>
BNN_FN void add_rows_at(int64_t vector, const ScalarOf<F>* a, int64_t depth, const ScalarOf<F>* m, const ScalarOf<F>* init,
                        int64_t n, ScalarOf<F>* y) {
  int64_t at[V];
  F sum[B][V];
  for (int v = 0; v < V; ++v) {
    at[v] = column_of<F>(vector + v, n);
    F start = init ? load<F>(init + at[v]) : splat<F>(0);
    for (int b = 0; b < B; ++b) sum[b][v] = start;
  }
  for (int64_t k = 0; k < depth; ++k) {
    F row[V];
    for (int v = 0; v < V; ++v) row[v] = load<F>(m + k * n + at[v]);
    for (int b = 0; b < B; ++b) {
      F factor = splat<F>(a[b * depth + k]);
      for (int v = 0; v < V; ++v) sum[b][v] = fma_lane(factor, row[v], sum[b][v]);
    }
  }
  for (int b = 0; b < B; ++b)
    for (int v = 0; v < V; ++v) store<F>(y + b * n + at[v], sum[b][v]);
}

// B rows of dot_rows.
template <class F, int B>
BNN_FN void dot_rows_at(const ScalarOf<F>* a, int64_t depth, const ScalarOf<F>* m, ScalarOf<F> init, ScalarOf<F>* y) {
  constexpr int W = Lane<F>::width;
  F sum[B];
  for (int b = 0; b < B; ++b) sum[b] = splat<F>(0);
  int64_t k = 0;
  for (; k + W <= depth; k += W)
    for (int b = 0; b < B; ++b) sum[b] = fma_lane(load<F>(a + b * depth + k), load<F>(m + k), sum[b]);
  if (k < depth) {
    constexpr int32_t lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    typename Lane<F>::Int lane;
    memcpy(&lane, lanes, sizeof lane);
    int64_t last = depth - W;
    auto counted = lane < static_cast<int32_t>(k - last);  // by the vector before
    F zero = splat<F>(0);
    for (int b = 0; b < B; ++b)
      sum[b] = fma_lane(select(counted, zero, load<F>(a + b * depth + last)), load<F>(m + last), sum[b]);
  }
  ScalarOf<F> sums[B];
  sum_lanes_of<F, B>(sum, sums);
  for (int b = 0; b < B; ++b) y[b] = init + sums[b];
}

// y[b] = init + a[b] . m, where a's rows are not shorter than a vector.
template <class F>
inline void dot_rows(const ScalarOf<F>* a, int64_t rows, int64_t depth, const ScalarOf<F>* m, ScalarOf<F> init, ScalarOf<F>* y) {
  int64_t b = 0;
  for (; b + 4 <= rows; b += 4) dot_rows_at<F, 4>(a + b * depth, depth, m, init, y + b);
  for (; b < rows; ++b) dot_rows_at<F, 1>(a + b * depth, depth, m, init, y + b);
}

// y[b] = init + sum_k a[b, k] m[k], m of [depth, n]. m and init are readable a vector beyond their end.
template <class F>
inline void add_rows(const ScalarOf<F>* a, int64_t rows, int64_t depth, const ScalarOf<F>* m, const ScalarOf<F>* init, int64_t n,
                     ScalarOf<F>* y) {
  constexpr int W = Lane<F>::width, B = W == 16 ? 8 : 4;  // with two vectors each, the sums stay in registers
  if (n == 1 && depth >= W) return dot_rows<F>(a, rows, depth, m, init ? *init : 0, y);
  ScalarOf<F> last_rows[B * W];
  int64_t b = 0;
  auto block = [&]<int R>() {
    bool fits = vectors_fit<F>(R, n, (rows - b) * n);
    ScalarOf<F>* to = fits ? y + b * n : last_rows;
    for_vectors<F>(n, [&]<int V>(int64_t v) { add_rows_at<F, R, V>(v, a + b * depth, depth, m, init, n, to); });
    if (!fits) copy_floats(y + b * n, last_rows, R * n);
    b += R;
  };
  while (b + B <= rows) block.template operator()<B>();
  while (b < rows) block.template operator()<1>();
}

// R rows of outer_rows, V vectors of each.
template <class F, int R, int V>
BNN_FN void outer_rows_at(int64_t vector, const ScalarOf<F>* a, int64_t depth, const ScalarOf<F>* c, int64_t n, int64_t rows,
                          F* out) {
  int64_t at[V], vectors = vectors_of<F>(n);
  F sum[R][V];
  for (int v = 0; v < V; ++v) {
    at[v] = column_of<F>(vector + v, n);
    for (int r = 0; r < R; ++r) sum[r][v] = splat<F>(0);
  }
  for (int64_t b = 0; b < rows; ++b) {
    F row[V];
    for (int v = 0; v < V; ++v) row[v] = load<F>(c + b * n + at[v]);
    for (int r = 0; r < R; ++r) {
      F factor = splat<F>(a[b * depth + r]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma_lane(factor, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) out[r * vectors + vector + v] += sum[r][v];
}

// out[k] += sum_b a[b, k] c[b], c of [rows, n] and readable a vector beyond its end.
template <class F>
inline void outer_rows(const ScalarOf<F>* a, int64_t rows, int64_t depth, const ScalarOf<F>* c, int64_t n, F* out) {
  constexpr int R = Lane<F>::width == 16 ? 8 : 4;
  int64_t k = 0, vectors = vectors_of<F>(n);
  auto block = [&]<int r>() {
    for_vectors<F>(n, [&]<int V>(int64_t v) { outer_rows_at<F, r, V>(v, a + k, depth, c, n, rows, out + k * vectors); });
    k += r;
  };
  while (k + R <= depth) block.template operator()<R>();
  if (k + R / 2 <= depth) block.template operator()<R / 2>();
  while (k < depth) block.template operator()<1>();
}

// out += sum_b c[b]
template <class F> inline void sum_rows(int64_t rows, const ScalarOf<F>* c, int64_t n, F* out) {
  for (int64_t v = 0; v < vectors_of<F>(n); ++v) {
    const ScalarOf<F>* column = c + column_of<F>(v, n);
    F sum[4] = {};  // chains of additions that do not wait for each other
    int64_t b = 0;
    for (; b + 4 <= rows; b += 4)
      for (int j = 0; j < 4; ++j) sum[j] += load<F>(column + (b + j) * n);
    for (; b < rows; ++b) sum[0] += load<F>(column + b * n);
    out[v] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
}

// A row of n from its vectors.
template <class F> inline void write_row(const F* vectors, int64_t n, ScalarOf<F>* row) {
  constexpr int W = Lane<F>::width;
  for (int64_t v = 0; v < vectors_of<F>(n); ++v)
    copy_floats(row + column_of<F>(v, n), reinterpret_cast<const float*>(vectors + v), n < W ? n : W);
}

template <class F> inline void narrow_forward(const NarrowForward& problem, int64_t task_begin, int64_t task_end) {
  NarrowTasks tasks(problem.samples, problem.batch);
  int64_t in = problem.inputs, out = problem.outputs, drawn = -1;
  alignas(64) float bias[kNarrow + Lane<F>::width], weight[kNarrow * kNarrow + Lane<F>::width];  // weight: [in, out]
  for (int64_t t = task_begin; t < task_end; ++t) {
    int64_t sample = t / tasks.per_sample, begin = tasks.first_row(t), rows = tasks.end_row(t) - begin;
    if (sample != drawn) {
      for (int64_t o = 0; o < out; ++o) {
        bias[o] = problem.bias ? problem.bias[sample * out + o] : 0;
        for (int64_t i = 0; i < in; ++i) weight[i * out + o] = problem.weight[(sample * out + o) * in + i];
      }
      drawn = sample;
    }
    const float* x = problem.x + (begin - (problem.shared ? sample * problem.batch : 0)) * in;
    add_rows<F>(x, rows, in, weight, bias, out, problem.y + begin * out);
  }
}

template <class F> inline void narrow_backward(const NarrowBackward& problem, int64_t task_begin, int64_t task_end) {
  constexpr int W = Lane<F>::width;
  NarrowTasks tasks(problem.samples, problem.batch);
  int64_t in = problem.inputs, out = problem.outputs, all = problem.samples * problem.batch;
  bool transposed = out == 1 && in >= W;
  int64_t depth = transposed ? 1 : in, n = transposed ? in : out, vectors = vectors_of<F>(n);
  F sums[(kNarrow + 1) * kNarrow / W];
  float last_rows[kRowsPerSum * W + W];
  for (int64_t t = task_begin; t < task_end; ++t) {
    int64_t sample = t / tasks.per_sample;
    int64_t before = problem.shared ? sample * problem.batch : 0;  // rows of y, not of x
    const float* weight = problem.weight ? problem.weight + sample * out * in : nullptr;
    for (int64_t i = 0; i < depth * vectors + vectors_of<F>(out); ++i) sums[i] = splat<F>(0);
    int64_t end = tasks.end_row(t);
    for (int64_t b = tasks.first_row(t); b < end; b += kRowsPerSum) {
      int64_t rows = b + kRowsPerSum < end ? kRowsPerSum : end - b;
      const float *x = problem.x + (b - before) * in, *g = problem.grad_y + b * out;
      if (weight) add_rows<F>(g, rows, out, weight, nullptr, in, problem.grad_x + b * in);
      if (!vectors_fit<F>(rows, out, (all - b) * out)) {
        copy_floats(last_rows, g, rows * out);
        g = last_rows;
      }
      outer_rows<F>(transposed ? g : x, rows, depth, transposed ? x : g, n, sums);
      sum_rows<F>(rows, g, out, sums + depth * vectors);
    }
    float* partial = problem.partial + t * (in + 1) * out;
    for (int64_t k = 0; k < depth; ++k) write_row(sums + k * vectors, n, partial + k * n);
    write_row(sums + depth * vectors, out, partial + in * out);
  }
}

BNN_FAST_END
