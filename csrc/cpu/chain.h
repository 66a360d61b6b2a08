// A chain of narrow layers, a_0 = x, z_l = W_l a_l + b_l, a_(l+1) = act_l(z_l), y the last, as one pass each way.
//
//   backward   g = dL/dz_l = dL/da_(l+1) act_l'(z_l),   dL/da_l = W_l^T g,   dW_l = sum over rows of g a_l^T,   db_l = sum of g
//
// The rows of a batch are taken in strips: R vectors of rows, [feature][R * lanes]. A strip goes through all layers while it is in
// the cache, with vectors along the rows, so that layers of any width waste no lanes, and weights are factors that the processor
// broadcasts as it loads them. The backward runs the forward of a few strips again, which costs a third more products and no
// memory; it keeps dW's sums by lane, in vectors, until the end of a task, so that nothing is summed across lanes before.
// Rows beyond the batch's end are held at zero after every layer: 0 times an overflow would be NaN.
#pragma once

#include "linear.h"

#include "../activation.h"

BNN_FAST_BEGIN

// sum[n][r] = init[n] + sum_k w[n * step_n + k * step_k] a[k][r]
template <class F, int N, int R>
BNN_FN void strip_products(const ScalarOf<F>* w, int64_t step_n, int64_t step_k, const ScalarOf<F>* init, int64_t depth, const F* a,
                           F (&sum)[N][R]) {
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) sum[n][r] = splat<F>(init ? init[n] : 0);
  for (int64_t k = 0; k < depth; ++k, a += R, w += step_k) {
    F row[R];
    for (int r = 0; r < R; ++r) row[r] = a[r];
    BNN_UNROLL for (int n = 0; n < N; ++n) {
      F factor = splat<F>(w[n * step_n]);
      for (int r = 0; r < R; ++r) sum[n][r] = fma_lane(factor, row[r], sum[n][r]);
    }
  }
}

// use(n, r, sum) for n < count and r < R.
template <class F, int R, class Use>
inline void strip_rows(const ScalarOf<F>* w, int64_t step_n, int64_t step_k, const ScalarOf<F>* init, int64_t count, int64_t depth,
                       const F* a, Use use) {
  constexpr int N = Lane<F>::width == 16 ? (R == 4 ? 5 : 8) : Lane<F>::width == 8 ? (R == 4 ? 2 : 4) : 4;
  int64_t first = 0;
  auto block = [&]<int n>() __attribute__((always_inline)) {
    F sum[n][R];
    strip_products<F, n, R>(w + first * step_n, step_n, step_k, init ? init + first : nullptr, depth, a, sum);
    for (int i = 0; i < n; ++i)
      for (int r = 0; r < R; ++r) use(first + i, r, sum[i][r]);
    first += n;
  };
  while (first + N <= count) block.template operator()<N>();
  if constexpr (N > 4)
    if (first + 4 <= count) block.template operator()<4>();
  if (first + 2 <= count) block.template operator()<2>();
  while (first < count) block.template operator()<1>();
}

// A strip of a batch: `vectors` vectors of rows, of which `rows` are there.
template <class F> struct Strip {
  int vectors;
  int64_t rows;

  Strip() = default;
  explicit Strip(int64_t left) {
    constexpr int W = Lane<F>::width;
    vectors = left > 2 * W ? 4 : left > W ? 2 : 1;
    rows = left < vectors * W ? left : vectors * W;
  }
  bool ragged() const { return rows < vectors * Lane<F>::width; }

  template <class Function> BNN_FN void with_vectors(Function f) const {
    if (vectors == 4)
      f.template operator()<4>();
    else if (vectors == 2)
      f.template operator()<2>();
    else
      f.template operator()<1>();
  }

  // From rows [rows, columns] in memory to [columns][vectors] and back; what is beyond the end is 0.
  void read(const ScalarOf<F>* from, int64_t columns, F* to) const {
    auto* lanes = reinterpret_cast<ScalarOf<F>*>(to);
    int64_t width = vectors * Lane<F>::width;
    for (int64_t c = 0; c < columns; ++c, lanes += width) {
      for (int64_t b = 0; b < rows; ++b) lanes[b] = from[b * columns + c];
      for (int64_t b = rows; b < width; ++b) lanes[b] = 0;
    }
  }
  void write(const F* from, int64_t columns, ScalarOf<F>* to) const {
    auto* lanes = reinterpret_cast<const ScalarOf<F>*>(from);
    for (int64_t c = 0; c < columns; ++c, lanes += vectors * Lane<F>::width)
      for (int64_t b = 0; b < rows; ++b) to[b * columns + c] = lanes[b];
  }
  void clear_tail(F* a, int64_t features) const {
    if (!ragged()) return;
    auto* lanes = reinterpret_cast<ScalarOf<F>*>(a);
    int64_t width = vectors * Lane<F>::width;
    for (int64_t c = 0; c < features; ++c, lanes += width)
      for (int64_t b = rows; b < width; ++b) lanes[b] = 0;
  }
};

template <class F> const ScalarOf<F>* weight_of(const ChainLayer& layer, int64_t sample) {
  return static_cast<const ScalarOf<F>*>(layer.weight) + (layer.drawn ? sample * layer.inputs * layer.outputs : 0);
}
template <class F> const ScalarOf<F>* bias_of(const ChainLayer& layer, int64_t sample) {
  return layer.bias ? static_cast<const ScalarOf<F>*>(layer.bias) + (layer.drawn ? sample * layer.outputs : 0) : nullptr;
}

// Whether the backward takes act' from a memory of its own; of these two it is in the sign of the value.
BNN_FN bool keeps_slopes(const ChainLayer& layer) { return layer.activation != kNoActivation && layer.activation != kRelu; }

// to = act(W a + b); slopes = act', unless null.
template <class F>
inline void chain_layer(const ChainLayer& layer, int64_t sample, const Strip<F>& strip, const F* a, F* to, F* slopes) {
  const ScalarOf<F>*w = weight_of<F>(layer, sample), *bias = bias_of<F>(layer, sample);
  strip.with_vectors([&]<int R>() {
    auto multiply = [&](auto store) { strip_rows<F, R>(w, layer.inputs, 1, bias, layer.outputs, layer.inputs, a, store); };
    if (layer.activation == kRelu)
      multiply([&](int64_t n, int r, F z) __attribute__((always_inline)) { to[n * R + r] = activate<kRelu>(z, 0, 0).value; });
    else
      multiply([&](int64_t n, int r, F z) __attribute__((always_inline)) { to[n * R + r] = z; });
  });
  if (keeps_slopes(layer)) {
    auto first = static_cast<ScalarOf<F>>(layer.first), second = static_cast<ScalarOf<F>>(layer.second);
    with_activation(layer.activation, [&]<int kind>() {
      for (int64_t i = 0; i < layer.outputs * strip.vectors; ++i) {
        Activated<F> y = activate<kind>(to[i], first, second);
        to[i] = y.value;
        if (slopes) slopes[i] = y.slope;
      }
    });
  }
  strip.clear_tail(to, layer.outputs);
}

BNN_FN int64_t widest(const ChainLayer* layers, int64_t count) {
  int64_t most = layers[0].inputs;
  for (int64_t l = 0; l < count; ++l) most = layers[l].outputs > most ? layers[l].outputs : most;
  return most;
}

template <class F> inline void chain_forward(const ChainForward& problem, int64_t task_begin, int64_t task_end) {
  using S = ScalarOf<F>;
  ChainTasks tasks(problem.samples, problem.batch, ChainForward::kMostRows);
  const ChainLayer& last = problem.layers[problem.count - 1];
  int64_t in = problem.layers[0].inputs, size = 4 * widest(problem.layers, problem.count);
  auto memory = aligned_array<F>(2 * size);
  for (int64_t t = task_begin; t < task_end; ++t) {
    int64_t sample = tasks.sample(t), end = tasks.end_row(t);
    const S* x = static_cast<const S*>(problem.x) + (problem.shared ? 0 : sample * problem.batch * in);
    S* y = static_cast<S*>(problem.y) + sample * problem.batch * last.outputs;
    for (int64_t row = tasks.first_row(t); row < end;) {
      Strip<F> strip(end - row);
      F *a = memory.get(), *to = a + size;
      strip.read(x + row * in, in, a);
      for (int64_t l = 0; l < problem.count; ++l) {
        chain_layer<F>(problem.layers[l], sample, strip, a, to, nullptr);
        F* next = a;
        a = to;
        to = next;
      }
      strip.write(a, last.outputs, y + row * last.outputs);
      row += strip.rows;
    }
  }
}

BNN_FAST_END
