// The backward of a chain of narrow layers: chain.h.
#pragma once

#include "chain.h"

BNN_FAST_BEGIN

// Some strips of a task's rows with all that the backward keeps of them: x and each layer's values, the slopes of those that
// have such, and two gradients.
template <class F> class ChainBlock {
 public:
  using S = ScalarOf<F>;
  static constexpr int W = Lane<F>::width, kStrips = W == 16 ? 4 : 8;

  explicit ChainBlock(const ChainBackward& problem) : problem_(problem) {
    int64_t at = problem.layers[0].inputs, most = widest(problem.layers, problem.count);
    for (int64_t l = 0; l < problem.count; ++l) {
      const ChainLayer& layer = problem.layers[l];
      value_at_[l] = at;
      at += layer.outputs;
      slope_at_[l] = at;
      at += keeps_slopes(layer) ? layer.outputs : 0;
      parameters_ += layer.parameters();
    }
    gradient_at_[0] = at;
    gradient_at_[1] = at + most;
    features_ = at + 2 * most;
    memory_ = aligned_array<F>(kStrips * features_ * 4);
  }

  // Values of the rows [row, end) of a sample, or of the first that fit; where they end.
  int64_t forward(int64_t sample, int64_t row, int64_t end) {
    int64_t in = problem_.layers[0].inputs;
    const S* x = static_cast<const S*>(problem_.x) + (problem_.shared ? 0 : sample * problem_.batch * in);
    for (count_ = 0; row < end && count_ < kStrips; ++count_) {
      rows_[count_] = row;
      const Strip<F>& strip = strips_[count_] = Strip<F>(end - row);
      strip.read(x + row * in, in, input(count_, 0));
      for (int64_t l = 0; l < problem_.count; ++l)
        chain_layer<F>(problem_.layers[l], sample, strip, input(count_, l), value(count_, l), slopes(count_, l));
      row += strip.rows;
    }
    return row;
  }

  // Adds to the sums by lane: of the first layer's weights [outputs, inputs], then its biases, then those of the next.
  void backward(int64_t sample, F* sums) {
    int64_t last = problem_.count - 1, in = problem_.layers[0].inputs, out = problem_.layers[last].outputs;
    const S* grad_y = static_cast<const S*>(problem_.grad_y) + sample * problem_.batch * out;
    for (int s = 0; s < count_; ++s) {
      strips_[s].read(grad_y + rows_[s] * out, out, gradient(s, 0));
      pass_activation(s, last, gradient(s, 0));
    }
    int now = 0;
    sums += parameters_;
    for (int64_t l = last; l >= 0; --l, now = 1 - now) {
      sums -= problem_.layers[l].parameters();
      add_outer(l, now, sums);
      for (int s = 0; s < count_ && (l > 0 || problem_.grad_x); ++s) multiply_back(s, l, sample, gradient(s, now), gradient(s, 1 - now));
    }
    S* grad_x = problem_.grad_x ? static_cast<S*>(problem_.grad_x) + sample * problem_.batch * in : nullptr;
    for (int s = 0; s < count_ && grad_x; ++s) strips_[s].write(gradient(s, now), in, grad_x + rows_[s] * in);
  }

 private:
  const ChainBackward& problem_;
  int64_t value_at_[kChainLayers], slope_at_[kChainLayers], gradient_at_[2], features_ = 0, parameters_ = 0;
  int count_ = 0;
  Strip<F> strips_[kStrips];
  int64_t rows_[kStrips];
  decltype(aligned_array<F>(0)) memory_ = aligned_array<F>(0);

  F* at(int s, int64_t feature) { return memory_.get() + (s * features_ + feature) * 4; }
  F* value(int s, int64_t l) { return at(s, value_at_[l]); }
  F* input(int s, int64_t l) { return l ? value(s, l - 1) : at(s, 0); }
  F* slopes(int s, int64_t l) { return at(s, slope_at_[l]); }
  F* gradient(int s, int which) { return at(s, gradient_at_[which]); }

  // From the gradient of act(z) to that of z.
  void pass_activation(int s, int64_t l, F* g) {
    const ChainLayer& layer = problem_.layers[l];
    int64_t n = layer.outputs * strips_[s].vectors;
    if (layer.activation == kRelu)
      for (int64_t i = 0; i < n; ++i) g[i] = select(value(s, l)[i] <= S(0), splat<F>(0), g[i]);
    else if (keeps_slopes(layer))
      for (int64_t i = 0; i < n; ++i) g[i] *= slopes(s, l)[i];
  }

  void multiply_back(int s, int64_t l, int64_t sample, const F* g, F* to) {
    const ChainLayer& layer = problem_.layers[l];
    const S* w = weight_of<F>(layer, sample);
    strips_[s].with_vectors([&]<int R>() {
      strip_rows<F, R>(w, 1, layer.inputs, nullptr, layer.inputs, layer.outputs, g,
                       [&](int64_t i, int r, F sum) __attribute__((always_inline)) { to[i * R + r] = sum; });
    });
    if (l > 0) pass_activation(s, l - 1, to);
  }

  // sums[o][i] += g[o] a[i], lane by lane, over all rows of the block; behind them g's alone where there is a bias.
  void add_outer(int64_t l, int now, F* sums) {
    constexpr int O = W == 8 ? 2 : 4, I = W == 8 ? 4 : 5;
    const ChainLayer& layer = problem_.layers[l];
    int64_t in = layer.inputs, o = 0;
    auto row = [&]<int o_count>() {
      int64_t i = 0;
      for (; i + I <= in; i += I) outer_tile<o_count, I>(l, now, o, i, sums);
      for (; i < in; ++i) outer_tile<o_count, 1>(l, now, o, i, sums);
      o += o_count;
    };
    while (o + O <= layer.outputs) row.template operator()<O>();
    while (o < layer.outputs) row.template operator()<1>();
    if (!layer.bias) return;
    sums += in * layer.outputs;
    for (int s = 0; s < count_; ++s) {
      int vectors = strips_[s].vectors;
      const F* g = gradient(s, now);
      for (int64_t k = 0; k < layer.outputs; ++k)
        for (int r = 0; r < vectors; ++r) sums[k] += g[k * vectors + r];
    }
  }

  template <int O, int I> BNN_FN void outer_tile(int64_t l, int now, int64_t o, int64_t i, F* sums) {
    int64_t in = problem_.layers[l].inputs;
    F sum[O][I];
    sums += o * in + i;
    for (int p = 0; p < O; ++p)
      for (int q = 0; q < I; ++q) sum[p][q] = sums[p * in + q];
    for (int s = 0; s < count_; ++s) {
      int vectors = strips_[s].vectors;
      const F *g = gradient(s, now) + o * vectors, *a = input(s, l) + i * vectors;
      for (int r = 0; r < vectors; ++r) {
        F row[I];
        for (int q = 0; q < I; ++q) row[q] = a[q * vectors + r];
        BNN_UNROLL for (int p = 0; p < O; ++p) {
          F factor = g[p * vectors + r];
          for (int q = 0; q < I; ++q) sum[p][q] = fma_lane(factor, row[q], sum[p][q]);
        }
      }
    }
    for (int p = 0; p < O; ++p)
      for (int q = 0; q < I; ++q) sums[p * in + q] = sum[p][q];
  }
};

template <class F> inline void chain_backward(const ChainBackward& problem, int64_t task_begin, int64_t task_end) {
  using S = ScalarOf<F>;
  ChainTasks tasks(problem.samples, problem.batch, ChainBackward::kMostRows);
  int64_t parameters = 0;
  for (int64_t l = 0; l < problem.count; ++l) parameters += problem.layers[l].parameters();
  ChainBlock<F> block(problem);
  auto sums = aligned_array<F>(parameters + 4);
  for (int64_t t = task_begin; t < task_end; ++t) {
    for (int64_t i = 0; i < parameters; ++i) sums[i] = splat<F>(0);
    int64_t sample = tasks.sample(t), end = tasks.end_row(t);
    for (int64_t row = tasks.first_row(t); row < end;) {
      row = block.forward(sample, row, end);
      block.backward(sample, sums.get());
    }
    S* partial = static_cast<S*>(problem.partial) + t * parameters;
    int64_t i = 0;
    for (; i + 4 <= parameters; i += 4) sum_lanes_of<F, 4>(sums.get() + i, partial + i);
    for (; i < parameters; ++i) partial[i] = sum_lanes(sums[i]);
  }
}

BNN_FAST_END
