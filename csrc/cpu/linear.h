// The small-batch variational linear layer: the weight tile is drawn in cache, multiplied at once, and never written.
//
//   forward    y_s[b, o] = sum_i x_s[b, i] w_s[o, i] + bias_s[o],   w_s = mu + sigma(rho) eps_s
//   backward   dW_s = g_s^T x_s,  dx_s = g_s W_s;  dmu and drho from dW_s as in gradient.h
//
// Forward: a task owns kOutputsPerTask outputs and walks all inputs, so each y is summed in one fixed order.
// Backward: a task owns a block of inputs and walks all outputs: one pass over mu and rho draws the tile again, adds to
// dx, forms the dW tile and writes dmu and drho; each dx is summed in output order, kOutputsPerSum at a time.
//
// Activations are packed [vector of inputs][batch][lanes] (problem.h): the loops read them in order, and no two rows of
// a batch fall on the same cache set. Forward packs all of x once; backward each task the inputs that it owns, and as
// many outputs of the gradient as a cache line holds.
#pragma once

#include <memory>

#include "gradient.h"

#include "kernels.h"

BNN_FAST_BEGIN

// Columns of a row that come soon: where rows take turns, the processor's own prefetching does not follow.
BNN_FN void prefetch(const Posterior& p, int64_t row, int64_t first, int64_t width) {
  if (row >= p.rows) return;
  // As integers: a span may begin before its row, where no pointer may point.
  auto begin = static_cast<uintptr_t>((row * p.columns + first) * size_of(p.type));
  auto from = [&](const void* data, uintptr_t b) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(data) + begin + b));
  };
  for (uintptr_t b = 0; b < static_cast<uintptr_t>(width * size_of(p.type)); b += 64) {
    from(p.mu, b);
    from(p.rho, b);
  }
}

// sums[b][r] += w[r] . x[b] over a span, for B batch rows at a time; w has each row's place. The span is summed by itself first: one chain of
// roundings over all inputs would err several times more.
template <class F, int R, int B>
BNN_FN void multiply_batch(const ScalarOf<F>* const (&w)[R], const ScalarOf<F>* x, int64_t stride, int vectors, F* sums) {
  constexpr int W = Lane<F>::width;
  F a[B][R];
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) a[b][r] = splat<F>(0);
  for (int v = 0; v < vectors; ++v, x += stride * W) {
    F input[B];
    for (int b = 0; b < B; ++b) input[b] = load<F>(x + b * W);
    for (int r = 0; r < R; ++r) {
      F row = in_register(load<F>(w[r] + v * W));
      for (int b = 0; b < B; ++b) a[b][r] = fma_lane(row, input[b], a[b][r]);
    }
  }
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) sums[b * R + r] += a[b][r];
}

// x points at the batch rows of one sample in the span's first vector; stride is how many rows there are of all samples.
template <class F, int R>
BNN_FN void multiply_tile(const ScalarOf<F>* const (&w)[R], const ScalarOf<F>* x, int64_t stride, int64_t batch, int vectors, F* sums) {
  constexpr int W = Lane<F>::width;
  constexpr int B = W < 16 ? 2 : R > 4 ? 3 : 4;  // B * R sums, B inputs and a weight stay in registers
  int64_t b = 0;
  for (; b + B <= batch; b += B) multiply_batch<F, R, B>(w, x + b * W, stride, vectors, sums + b * R);
  if (b + 2 <= batch) {
    multiply_batch<F, R, 2>(w, x + b * W, stride, vectors, sums + b * R);
    b += 2;
  }
  for (; b < batch; ++b) multiply_batch<F, R, 1>(w, x + b * W, stride, vectors, sums + b * R);
}

// Where each of R rows of a tile is.
template <class S, int R> struct RowsOfTile {
  const S* at[R];
  BNN_FN explicit RowsOfTile(const S* tile) {
    for (int r = 0; r < R; ++r) at[r] = tile + r * kTile;
  }
};

template <class F, int R>
inline void forward_rows(const LinearForward& problem, int64_t row, PriorSpan<F>& prior, const SpanNoise& noise,
                         ScalarOf<F>* sigma, ScalarOf<F>* log_sigma, F* sums, Sum<F>& kl) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  const Posterior& p = problem.weight;
  int64_t end = padded_columns<F>(p), x_rows = problem.shared ? problem.batch : problem.samples * problem.batch;
  Tile<F> mu_scratch, rho_scratch;
  alignas(64) S tile[R * kTile];
  for (int r = 0; r < R; ++r)
    for (int64_t c = 0; c < end; c += kTile) {
      Span span = span_at(p, row + r, c, end);
      const S* mu = load_span<F>(p.mu, p.type, p.columns, span, 0, mu_scratch);
      const S* rho = load_span<F>(p.rho, p.type, p.columns, span, -INFINITY, rho_scratch);
      if (problem.divergence == kAnalytic) prior.move_to(p, span);
      sigma_span<F>(p, problem.divergence, mu, rho, span.width, prior, sigma + r * end + c, log_sigma + r * end + c, kl);
    }
  for (int64_t s = 0; s < problem.samples; ++s) {
    const S* x = static_cast<const S*>(problem.x) + (problem.shared ? 0 : s * problem.batch * W);
    for (int64_t i = 0; i < problem.batch * R; ++i) sums[i] = splat<F>(0);
    for (int64_t c = 0; c < end; c += kTile) {
      int width = 0;
      for (int r = 0; r < R; ++r) {
        Span span = span_at(p, row + r, c, end);
        const S* mu = load_span<F>(p.mu, p.type, p.columns, span, 0, mu_scratch);
        const S* rho = nullptr;
        if (problem.divergence == kSampled) {
          rho = load_span<F>(p.rho, p.type, p.columns, span, -INFINITY, rho_scratch);
          prior.move_to(p, span);
        }
        draw_span<F>(noise, span, s, problem.divergence, mu, rho, sigma + r * end + c, log_sigma + r * end + c, prior,
                     tile + r * kTile, kl);
        width = span.width;
      }
      multiply_tile<F, R>(RowsOfTile<S, R>(tile).at, x + c * x_rows, x_rows, problem.batch, width / W, sums);
    }
    for (int64_t b = 0; b < problem.batch; ++b) {
      S y[R];
      sum_lanes_of<F, R>(sums + b * R, y);
      for (int r = 0; r < R && problem.bias; ++r) y[r] += static_cast<const S*>(problem.bias)[s * p.rows + row + r];
      convert_to(y, R, problem.y, problem.y_type, (s * problem.batch + b) * p.rows + row);
    }
  }
}

// The same of R outputs from `row` on, and of the backward's, with factorised noise: factorised_linear.h
template <class F, int R> void factorised_forward_rows(const LinearForward& problem, int64_t row, F* sums);
template <class F, int R>
void factorised_backward_rows(const LinearBackward& problem, int64_t row, int64_t begin, int64_t end, const ScalarOf<F>* g,
                              const ScalarOf<F>* x, ScalarOf<F>* grad_x);

template <class T> std::unique_ptr<T[], void (*)(T*)> aligned_array(int64_t n) {
  void* p = ::operator new(static_cast<size_t>(n > 0 ? n : 1) * sizeof(T), std::align_val_t(64));
  return {static_cast<T*>(p), [](T* q) { ::operator delete(q, std::align_val_t(64)); }};
}

// Outputs at a time: the more, the fewer times the batch is read; as many as have registers.
template <class F> constexpr int kMostOutputs = Lane<F>::width == 16 ? 8 : 4;

// Calls rows.operator()<R>() for the rows that are left, each of which calls take R.
template <class F, class Left, class Rows> BNN_FN void by_row_blocks(Left left, Rows rows) {
  while (left() >= kMostOutputs<F>) rows.template operator()<kMostOutputs<F>>();
  if (left() >= 4) rows.template operator()<4>();
  while (left() > 0) rows.template operator()<1>();
}

template <class F> inline void linear_forward(const LinearForward& problem, int64_t task_begin, int64_t task_end) {
  const Posterior& p = problem.weight;
  PriorSpan<F> prior(p.prior);
  SpanNoise noise(p);
  int64_t size = p.column_factors ? 0 : kOutputsPerTask * padded_columns<F>(p);
  auto sigma = aligned_array<ScalarOf<F>>(size);
  auto log_sigma = aligned_array<ScalarOf<F>>(problem.divergence == kSampled ? size : 0);
  auto sums = aligned_array<F>(problem.batch * kOutputsPerTask);
  for (int64_t t = task_begin; t < task_end; ++t) {
    Sum<F> kl;
    int64_t row = t * kOutputsPerTask, end = row + kOutputsPerTask < p.rows ? row + kOutputsPerTask : p.rows;
    by_row_blocks<F>([&] { return end - row; }, [&]<int R>() {
      if (p.column_factors)
        factorised_forward_rows<F, R>(problem, row, sums.get());
      else
        forward_rows<F, R>(problem, row, prior, noise, sigma.get(), log_sigma.get(), sums.get(), kl);
      row += R;
    });
    if (problem.kl) problem.kl[t] = kl.total();
  }
}

constexpr int64_t kGradientOutputs = 16;  // of grad_y at a time
constexpr int64_t kOutputsPerSum = 128;   // of dx, summed by themselves first
static_assert(kGradientOutputs % kOutputsPerTask == 0 && kOutputsPerSum % kGradientOutputs == 0);

// grad_weight[r] = sum_b g[b][r] x[b] and grad_x[b] += sum_r g[b][r] w[r] over a span; g has rows of kGradientOutputs, x and
// grad_x each a stride of its own.
template <class F, int R, bool with_x>
BNN_FN void outer_tile(const ScalarOf<F>* const (&w)[R], const ScalarOf<F>* g, const ScalarOf<F>* x, int64_t x_stride, ScalarOf<F>* grad_x,
                       int64_t stride, int64_t batch, int vectors, ScalarOf<F>* grad_weight) {
  constexpr int W = Lane<F>::width;
  for (int v = 0; v < vectors; ++v, x += x_stride * W, grad_x += with_x ? stride * W : 0) {
    F row[R], sum[R];
    for (int r = 0; r < R; ++r) {
      row[r] = load<F>(w[r] + v * W);
      sum[r] = splat<F>(0);
    }
    for (int64_t b = 0; b < batch; ++b) {
      F input = load<F>(x + b * W), back;
      if (with_x) back = load<F>(grad_x + b * W);
      for (int r = 0; r < R; ++r) {
        F gradient = splat<F>(g[b * kGradientOutputs + r]);
        sum[r] = fma_lane(gradient, input, sum[r]);
        if (with_x) back = fma_lane(gradient, row[r], back);
      }
      if (with_x) store<F>(grad_x + b * W, back);
    }
    for (int r = 0; r < R; ++r) store<F>(grad_weight + r * kTile + v * W, sum[r]);
  }
}

// x and grad_x (or null) hold the task's columns [begin, end), g the gradient of the outputs from `row` on.
template <class F, int R>
inline void backward_rows(const LinearBackward& problem, int64_t row, int64_t begin, int64_t end, const ScalarOf<F>* g,
                          const ScalarOf<F>* x, ScalarOf<F>* grad_x, GradientSpan<F>* gradient) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  const Posterior& p = problem.weight;
  int64_t all = problem.samples * problem.batch, x_rows = problem.shared ? problem.batch : all;
  alignas(64) S weight[R * kTile], eps[R * kTile], grad_weight[R * kTile], by_mu[R * kTile], by_sigma[R * kTile];
  Span spans[R];
  DrawSpan<F> draws[R];
  for (int r = 0; r < R; ++r) {
    int at = r * kTile;
    draws[r] = {eps + at, weight + at, grad_weight + at, by_mu + at, by_sigma + at};
    spans[r] = span_at(p, row + r, begin, end);
    gradient[r].move_to(spans[r]);
    prefetch(p, spans[r].row + R, spans[r].first, spans[r].width);
  }
  for (int64_t s = 0; s < problem.samples; ++s) {
    for (int r = 0; r < R; ++r) gradient[r].draw(spans[r], s, draws[r]);
    int64_t first = s * problem.batch;
    int vectors = spans[0].width / W;
    const S *g_s = g + first * kGradientOutputs, *x_s = x + (problem.shared ? 0 : first * W);
    RowsOfTile<S, R> rows(weight);
    if (grad_x)
      outer_tile<F, R, true>(rows.at, g_s, x_s, x_rows, grad_x + first * W, all, problem.batch, vectors, grad_weight);
    else
      outer_tile<F, R, false>(rows.at, g_s, x_s, x_rows, nullptr, all, problem.batch, vectors, grad_weight);
    for (int r = 0; r < R; ++r) gradient[r].accumulate(spans[r], s, draws[r]);
  }
  for (int r = 0; r < R; ++r) gradient[r].finish(spans[r], draws[r], problem.grad_mu, problem.grad_rho);
}

// packed[v][b] = rows[b][v * W - shift ...] for the columns [begin, end), of vectors; rows are [batch, columns].
template <class F>
inline void pack(const void* rows, Type type, int64_t batch, int64_t columns, int64_t shift, int64_t begin, int64_t end,
                 ScalarOf<F>* packed) {
  constexpr int W = Lane<F>::width;
  for (int64_t c = begin; c < end; c += W)
    for (int64_t b = 0; b < batch; ++b, packed += W) {
      const ScalarOf<F>* values = load_span<F>(rows, type, columns, Span{b, c - shift, W, 0}, 0, packed);
      if (values != packed) memcpy(packed, values, sizeof(ScalarOf<F>) * W);
    }
}

template <class F>
inline void unpack(const ScalarOf<F>* packed, Type type, int64_t batch, int64_t columns, int64_t shift, int64_t begin,
                   int64_t end, void* rows) {
  constexpr int W = Lane<F>::width;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = begin; c < end; c += W)
      store_span<F>(rows, type, columns, Span{b, c - shift, W, 0}, packed + (c - begin) * batch + b * W);
}

template <class F> inline void linear_backward(const LinearBackward& problem, int64_t task_begin, int64_t task_end) {
  using S = ScalarOf<F>;
  const Posterior& p = problem.weight;
  int64_t padded = padded_columns<F>(p), block = column_block(p.columns), all = problem.samples * problem.batch;
  int64_t shift = column_shift(p), x_rows = problem.shared ? problem.batch : all;
  auto gradient = [&] { return GradientSpan<F>(p, problem.divergence, problem.samples, problem.grad_kl); };
  GradientSpan<F> gradients[] = {gradient(), gradient(), gradient(), gradient(), gradient(), gradient(), gradient(), gradient()};
  static_assert(std::size(gradients) >= kMostOutputs<F>);
  auto x = aligned_array<S>(block * x_rows), g = aligned_array<S>(kGradientOutputs * all);
  auto total = aligned_array<S>(problem.grad_x ? block * all : 0), part = aligned_array<S>(problem.grad_x ? block * all : 0);
  for (int64_t t = task_begin; t < task_end; ++t) {
    int64_t begin = t * block, end = begin + block < padded ? begin + block : padded;
    int64_t size = problem.grad_x ? (end - begin) * all : 0;
    S* sums = problem.grad_x ? part.get() : nullptr;
    pack<F>(problem.x, problem.type, x_rows, p.columns, shift, begin, end, x.get());
    for (int64_t i = 0; i < size; ++i) total[i] = sums[i] = 0;
    for (int64_t row = 0; row < p.rows;) {
      int64_t first = row, stop = row + kGradientOutputs < p.rows ? row + kGradientOutputs : p.rows;
      for (int64_t b = 0; b < all; ++b)
        memcpy(g.get() + b * kGradientOutputs, static_cast<const S*>(problem.grad_y) + b * p.rows + row,
               sizeof(S) * static_cast<size_t>(stop - row));
      by_row_blocks<F>([&] { return stop - row; }, [&]<int R>() {
        const S* g_row = g.get() + (row - first);
        if (p.column_factors)
          factorised_backward_rows<F, R>(problem, row, begin, end, g_row, x.get(), sums);
        else
          backward_rows<F, R>(problem, row, begin, end, g_row, x.get(), sums, gradients);
        row += R;
      });
      if (row % kOutputsPerSum != 0 && row < p.rows) continue;
      for (int64_t i = 0; i < size; ++i) {
        total[i] += sums[i];
        sums[i] = 0;
      }
    }
    if (problem.grad_x) unpack<F>(total.get(), problem.type, all, p.columns, shift, begin, end, problem.grad_x);
  }
}

// Tasks are vectors.
template <class F> inline void pack_vectors(const Pack& problem, int64_t begin, int64_t end) {
  constexpr int W = Lane<F>::width;
  pack<F>(problem.rows, problem.type, problem.batch, problem.columns, problem.shift, begin * W, end * W,
          static_cast<ScalarOf<F>*>(problem.packed) + begin * W * problem.batch);
}

BNN_FAST_END
