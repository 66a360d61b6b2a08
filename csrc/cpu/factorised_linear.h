// The small-batch layer with factorised noise (linear.h has its tasks and layouts, factorised.h the noise): mu and sigma are read
// once each way, several rows at a time.
//
//   forward    y[b, o] = sum_i x[b, i] w[o, i] + bias[o],   w = mu + sigma row column
//   backward   dmu = g^T x,   dsigma = (g^T x) row column,   dx = g w
//
// The sum for a weight's gradient stays in a register until both gradients are written.
#pragma once

#include "factorised.h"
#include "linear.h"

BNN_FAST_BEGIN

// R rows of a tensor [rows, columns] at a span: where they are, or a copy.
template <class F, int R> struct RowsAt {
  using S = ScalarOf<F>;
  const S* data;
  int64_t stride;
  alignas(64) S scratch[R * kTile];

  BNN_FN RowsAt(const void* from, Type type, int64_t columns, Span span, S pad)
      : data(span.in_place<const S>(from, type, columns)), stride(columns) {
    if (data) return;
    data = scratch, stride = kTile;
    for (int r = 0; r < R; ++r, ++span.row) load_span<F>(from, type, columns, span, pad, scratch + r * kTile);
  }
  BNN_FN F at(int r, int i) const { return load<F>(data + r * stride + i); }
};

// The same for what is written.
template <class F, int R> struct RowsTo {
  using S = ScalarOf<F>;
  S* data;
  int64_t stride;
  alignas(64) S scratch[R * kTile];

  BNN_FN RowsTo(void* to, Type type, int64_t columns, const Span& span)
      : data(span.in_place<S>(to, type, columns)), stride(columns) {
    if (!data) data = scratch, stride = kTile;
  }
  BNN_FN void put(int r, int i, F value) { store<F>(data + r * stride + i, value); }
  BNN_FN void finish(void* to, Type type, int64_t columns, Span span) const {
    for (int r = 0; r < R && data == scratch; ++r, ++span.row) store_span<F>(to, type, columns, span, scratch + r * kTile);
  }
};

template <class F, int R> void factorised_forward_rows(const LinearForward& problem, int64_t row, F* sums) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  const Posterior& p = problem.weight;
  const S* factors = static_cast<const S*>(p.row_factors) + row;
  int64_t end = padded_columns<F>(p);
  alignas(64) S tile[R * kTile];
  for (int64_t i = 0; i < problem.batch * R; ++i) sums[i] = splat<F>(0);
  for (int64_t c = 0; c < end; c += kTile) {
    Span span = span_at(p, row, c, end);
    RowsAt<F, R> mu(p.mu, p.type, p.columns, span, 0), sigma(p.rho, p.type, p.columns, span, -INFINITY);
    const S* columns = static_cast<const S*>(p.column_factors) + span.first;
    for (int i = 0; i < span.width; i += W) {
      F column = load<F>(columns + i);
      for (int r = 0; r < R; ++r)
        store<F>(tile + r * kTile + i, factorised_weight(mu.at(r, i), sigma.at(r, i), splat<F>(factors[r]) * column));
    }
    const S* x = static_cast<const S*>(problem.x) + c * problem.batch;
    multiply_tile<F, R>(RowsOfTile<S, R>(tile).at, x, problem.batch, problem.batch, span.width / W, sums);
  }
  for (int64_t b = 0; b < problem.batch; ++b) {
    S y[R];
    sum_lanes_of<F, R>(sums + b * R, y);
    for (int r = 0; r < R && problem.bias; ++r) y[r] += static_cast<const S*>(problem.bias)[row + r];
    convert_to(y, R, problem.y, problem.y_type, b * p.rows + row);
  }
}

template <class F, int R, bool with_x>
inline void factorised_gradient_rows(const LinearBackward& problem, int64_t row, int64_t begin, int64_t end, const ScalarOf<F>* g,
                                     const ScalarOf<F>* x, ScalarOf<F>* grad_x) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  const Posterior& p = problem.weight;
  Span span = span_at(p, row, begin, end);
  for (int r = 0; r < R; ++r) prefetch(p, row + r + R, span.first, span.width);
  RowsAt<F, R> mu(p.mu, p.type, p.columns, span, 0), sigma(p.rho, p.type, p.columns, span, -INFINITY);
  RowsTo<F, R> d_mu(problem.grad_mu, p.type, p.columns, span), d_sigma(problem.grad_rho, p.type, p.columns, span);
  const S *factors = static_cast<const S*>(p.row_factors) + row, *columns = static_cast<const S*>(p.column_factors) + span.first;
  for (int i = 0; i < span.width; i += W, x += problem.batch * W, grad_x += with_x ? problem.batch * W : 0) {
    F column = load<F>(columns + i), weight[R], sum[R];
    for (int r = 0; r < R; ++r) {
      if (with_x) weight[r] = factorised_weight(mu.at(r, i), sigma.at(r, i), splat<F>(factors[r]) * column);
      sum[r] = splat<F>(0);
    }
    for (int64_t b = 0; b < problem.batch; ++b) {
      F input = load<F>(x + b * W), back;
      if (with_x) back = load<F>(grad_x + b * W);
      for (int r = 0; r < R; ++r) {
        F gradient = splat<F>(g[b * kGradientOutputs + r]);
        sum[r] = fma_lane(gradient, input, sum[r]);
        if (with_x) back = fma_lane(gradient, weight[r], back);
      }
      if (with_x) store<F>(grad_x + b * W, back);
    }
    for (int r = 0; r < R; ++r) {
      F zero = splat<F>(0), by_weight = select(is_pruned(sigma.at(r, i)), zero, sum[r]);
      d_mu.put(r, i, by_weight);
      d_sigma.put(r, i, by_weight * (splat<F>(factors[r]) * column));
    }
  }
  d_mu.finish(problem.grad_mu, p.type, p.columns, span);
  d_sigma.finish(problem.grad_rho, p.type, p.columns, span);
}

template <class F, int R>
void factorised_backward_rows(const LinearBackward& problem, int64_t row, int64_t begin, int64_t end, const ScalarOf<F>* g,
                              const ScalarOf<F>* x, ScalarOf<F>* grad_x) {
  if (grad_x)
    factorised_gradient_rows<F, R, true>(problem, row, begin, end, g, x, grad_x);
  else
    factorised_gradient_rows<F, R, false>(problem, row, begin, end, g, x, nullptr);
}

BNN_FAST_END
