// The small-batch variational linear layer: the weight tile is drawn in cache, multiplied at once, and never written.
//
//   forward    y_s[b, o] = sum_i x_s[b, i] w_s[o, i] + bias_s[o],   w_s = mu + sigma(rho) eps_s
//   backward   dW_s = g_s^T x_s,  dx_s = g_s W_s;  dmu and drho from dW_s as in sample.h
//
// Forward: a task owns kRowBlock outputs and walks all inputs, so each y is summed in one fixed order.
// Backward: a task owns a block of inputs and walks all outputs: one pass over mu and rho draws the tile again, adds to
// dx, forms the dW tile and writes dmu and drho; each dx is summed in output order, kOutputsPerSum at a time.
//
// Activations are packed [vector of inputs][batch][lanes] (problem.h): the loops read them in order, and no two rows of
// a batch fall on the same cache set.
#pragma once

#include <memory>

#include "sample.h"

#include "kernels.h"

BNN_FAST_BEGIN

// sums[b][r] += w[r] . x[b] over a span, for B batch rows at a time. The span is summed by itself first: one chain of
// roundings over all inputs would err several times more.
template <class F, int R, int B>
BNN_FN void multiply_batch(const ScalarOf<F>* w, const ScalarOf<F>* x, int64_t stride, int vectors, F* sums) {
  constexpr int W = Lane<F>::width;
  F a[B][R];
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) a[b][r] = splat<F>(0);
  for (int v = 0; v < vectors; ++v, x += stride * W) {
    F row[R];
    for (int r = 0; r < R; ++r) row[r] = load<F>(w + r * kTile + v * W);
    for (int b = 0; b < B; ++b) {
      F input = load<F>(x + b * W);
      for (int r = 0; r < R; ++r) a[b][r] = fma_lane(row[r], input, a[b][r]);
    }
  }
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) sums[b * R + r] += a[b][r];
}

// x points at the batch rows of one sample in the span's first vector; stride is the batch of all samples.
template <class F, int R>
inline void multiply_tile(const ScalarOf<F>* w, const ScalarOf<F>* x, int64_t stride, int64_t batch, int vectors, F* sums) {
  constexpr int W = Lane<F>::width;
  constexpr int B = W == 16 ? 4 : 2;  // B * R sums and R weights stay in registers
  int64_t b = 0;
  for (; b + B <= batch; b += B) multiply_batch<F, R, B>(w, x + b * W, stride, vectors, sums + b * R);
  for (; b < batch; ++b) multiply_batch<F, R, 1>(w, x + b * W, stride, vectors, sums + b * R);
}

template <class F, int R>
inline void forward_rows(const LinearForward& problem, int64_t row, PriorSpan<F>& prior, const SpanNoise& noise,
                         ScalarOf<F>* sigma, ScalarOf<F>* log_sigma, F* sums, Sum<F>& kl) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  const Posterior& p = problem.weight;
  int64_t end = padded_columns<F>(p), all = problem.samples * problem.batch;
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
    const S* x = static_cast<const S*>(problem.x) + s * problem.batch * W;
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
      multiply_tile<F, R>(tile, x + c * all, all, problem.batch, width / W, sums);
    }
    for (int64_t b = 0; b < problem.batch; ++b) {
      S y[R];
      for (int r = 0; r < R; ++r) {
        y[r] = sum_lanes(sums[b * R + r]);
        if (problem.bias) y[r] += static_cast<const S*>(problem.bias)[s * p.rows + row + r];
      }
      convert_to(y, R, problem.y, problem.y_type, (s * problem.batch + b) * p.rows + row);
    }
  }
}

template <class T> std::unique_ptr<T[], void (*)(T*)> aligned_array(int64_t n) {
  void* p = ::operator new(static_cast<size_t>(n > 0 ? n : 1) * sizeof(T), std::align_val_t(64));
  return {static_cast<T*>(p), [](T* q) { ::operator delete(q, std::align_val_t(64)); }};
}

template <class F> inline void linear_forward(const LinearForward& problem, int64_t task_begin, int64_t task_end) {
  const Posterior& p = problem.weight;
  PriorSpan<F> prior(p.prior);
  SpanNoise noise(p);
  int64_t size = kRowBlock * padded_columns<F>(p);
  auto sigma = aligned_array<ScalarOf<F>>(size);
  auto log_sigma = aligned_array<ScalarOf<F>>(problem.divergence == kSampled ? size : 0);
  auto sums = aligned_array<F>(problem.batch * kRowBlock);
  for (int64_t t = task_begin; t < task_end; ++t) {
    Sum<F> kl;
    int64_t row = t * kRowBlock;
    if (row + kRowBlock <= p.rows) {
      forward_rows<F, kRowBlock>(problem, row, prior, noise, sigma.get(), log_sigma.get(), sums.get(), kl);
    } else {
      for (; row < p.rows; ++row) forward_rows<F, 1>(problem, row, prior, noise, sigma.get(), log_sigma.get(), sums.get(), kl);
    }
    if (problem.kl) problem.kl[t] = kl.total();
  }
}

// grad_weight[r] = sum_b g[r][b] x[b] and grad_x[b] += sum_r g[r][b] w[r] over a span.
template <class F, int R, bool with_x>
BNN_FN void outer_tile(const ScalarOf<F>* w, const ScalarOf<F>* g, const ScalarOf<F>* x, ScalarOf<F>* grad_x, int64_t stride,
                       int64_t batch, int vectors, ScalarOf<F>* grad_weight) {
  constexpr int W = Lane<F>::width;
  for (int v = 0; v < vectors; ++v, x += stride * W, grad_x += with_x ? stride * W : 0) {
    F row[R], sum[R];
    for (int r = 0; r < R; ++r) {
      row[r] = load<F>(w + r * kTile + v * W);
      sum[r] = splat<F>(0);
    }
    for (int64_t b = 0; b < batch; ++b) {
      F input = load<F>(x + b * W), back;
      if (with_x) back = load<F>(grad_x + b * W);
      for (int r = 0; r < R; ++r) {
        F gradient = splat<F>(g[r * stride + b]);
        sum[r] = fma_lane(gradient, input, sum[r]);
        if (with_x) back = fma_lane(gradient, row[r], back);
      }
      if (with_x) store<F>(grad_x + b * W, back);
    }
    for (int r = 0; r < R; ++r) store<F>(grad_weight + r * kTile + v * W, sum[r]);
  }
}

// The same span of a later row: rows are far apart in memory, where the processor's own prefetching does not follow.
BNN_FN void prefetch_span(const Posterior& p, const Span& span, int64_t rows_ahead) {
  if (span.row + rows_ahead >= p.rows) return;
  int64_t begin = ((span.row + rows_ahead) * p.columns + span.first) * size_of(p.type);
  for (int64_t b = 0; b < span.width * size_of(p.type); b += 64) {
    __builtin_prefetch(static_cast<const char*>(p.mu) + begin + b);
    __builtin_prefetch(static_cast<const char*>(p.rho) + begin + b);
  }
}

// grad_x points at the first vector of the task's columns [begin, end), or is null.
template <class F, int R>
inline void backward_rows(const LinearBackward& problem, int64_t row, int64_t begin, int64_t end, ScalarOf<F>* grad_x,
                          GradientSpan<F>* gradient) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  const Posterior& p = problem.weight;
  int64_t all = problem.samples * problem.batch;
  alignas(64) S weight[R * kTile], eps[R * kTile], grad_weight[R * kTile], by_mu[R * kTile], by_sigma[R * kTile];
  Span spans[R];
  for (int r = 0; r < R; ++r) {
    spans[r] = span_at(p, row + r, begin, end);
    gradient[r].move_to(spans[r]);
    prefetch_span(p, spans[r], R);
  }
  for (int64_t s = 0; s < problem.samples; ++s) {
    for (int r = 0; r < R; ++r) gradient[r].draw(spans[r], s, eps + r * kTile, weight + r * kTile);
    const S* g = static_cast<const S*>(problem.grad_y) + row * all + s * problem.batch;
    const S* x = static_cast<const S*>(problem.x) + begin * all + s * problem.batch * W;
    int vectors = spans[0].width / W;
    if (grad_x) {
      outer_tile<F, R, true>(weight, g, x, grad_x + s * problem.batch * W, all, problem.batch, vectors, grad_weight);
    } else {
      outer_tile<F, R, false>(weight, g, x, nullptr, all, problem.batch, vectors, grad_weight);
    }
    for (int r = 0; r < R; ++r)
      gradient[r].accumulate(spans[r], s, grad_weight + r * kTile, eps + r * kTile, weight + r * kTile, by_mu + r * kTile,
                             by_sigma + r * kTile);
  }
  for (int r = 0; r < R; ++r)
    gradient[r].finish(spans[r], by_mu + r * kTile, by_sigma + r * kTile, problem.grad_mu, problem.grad_rho);
}

constexpr int64_t kOutputsPerSum = 128;

template <class F> inline void linear_backward(const LinearBackward& problem, int64_t task_begin, int64_t task_end) {
  using S = ScalarOf<F>;
  const Posterior& p = problem.weight;
  int64_t padded = padded_columns<F>(p), block = column_block(p.columns), all = problem.samples * problem.batch;
  auto gradient = [&] { return GradientSpan<F>(p, problem.divergence, problem.samples, problem.grad_kl); };
  GradientSpan<F> gradients[kRowBlock] = {gradient(), gradient(), gradient(), gradient()};
  auto partial = aligned_array<S>(problem.grad_x ? block * all : 0);
  for (int64_t t = task_begin; t < task_end; ++t) {
    int64_t begin = t * block, end = begin + block < padded ? begin + block : padded;
    int64_t size = problem.grad_x ? (end - begin) * all : 0;
    S* total = problem.grad_x ? static_cast<S*>(problem.grad_x) + begin * all : nullptr;
    S* part = problem.grad_x ? partial.get() : nullptr;
    for (int64_t i = 0; i < size; ++i) total[i] = 0;
    for (int64_t row = 0; row < p.rows;) {
      int64_t stop = row + kOutputsPerSum < p.rows ? row + kOutputsPerSum : p.rows;
      for (int64_t i = 0; i < size; ++i) part[i] = 0;
      for (; row + kRowBlock <= stop; row += kRowBlock) backward_rows<F, kRowBlock>(problem, row, begin, end, part, gradients);
      for (; row < stop; ++row) backward_rows<F, 1>(problem, row, begin, end, part, gradients);
      for (int64_t i = 0; i < size; ++i) total[i] += part[i];
    }
  }
}

// Tasks are vectors: packed[v][b] = rows[b][v * W - shift ...].
template <class F> inline void pack(const Pack& problem, int64_t begin, int64_t end) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  for (int64_t v = begin; v < end; ++v)
    for (int64_t b = 0; b < problem.batch; ++b) {
      Span span{b, v * W - problem.shift, W, 0};
      S* packed = static_cast<S*>(problem.packed) + (v * problem.batch + b) * W;
      const S* values = load_span<F>(problem.rows, problem.type, problem.columns, span, 0, packed);
      if (values != packed) memcpy(packed, values, sizeof(S) * W);
    }
}

// Tasks are batch rows.
template <class F> inline void unpack(const Pack& problem, int64_t begin, int64_t end) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  for (int64_t b = begin; b < end; ++b)
    for (int64_t v = 0; v < problem.vectors; ++v) {
      Span span{b, v * W - problem.shift, W, 0};
      store_span<F>(problem.rows, problem.type, problem.columns, span,
                    static_cast<const S*>(problem.packed) + (v * problem.batch + b) * W);
    }
}

BNN_FAST_END
