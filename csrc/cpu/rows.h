// The rows of a drawn table that are looked up (../rows.h), in spans of one or several of them:
//
//   w_i = mu_v + sigma(rho_v) eps(draw of i, v)     with v = rows[i]          KL = sum_i weight_i KL_v
//
// What each adds to the gradients of its row is as in gradient.h, of one draw. All else is that of the whole table: a span
// that is looked up says where its rows are (span.h), and the noise is counted by that.
#pragma once

#include "../rows.h"
#include "gradient.h"

BNN_FAST_BEGIN

// Calls body(span, the same in the table, draw) for the spans of task t. Each is of one draw; where there is a KL of one row, as rows
// weigh differently.
template <class F, class Body> inline void for_looked_up(const Posterior& p, const LookUp& at, bool apart, int64_t t, Body body) {
  for_spans<F>(p, t, [&](const Span& rows) {
    for (int64_t row = rows.row, end = rows.row + rows.rows; row < end;) {
      int64_t draw = at.draw_of(row), next = row + 1;
      while (!apart && next < end && at.draw_of(next) == draw) ++next;
      Span span = rows.rows == 1 ? rows : span_of_rows<F>(p, row, next), found = span;
      found.at = at.rows + row;
      body(span, found, draw);
      row = next;
    }
  });
}

template <class F> inline void rows_forward(const RowsForward& problem, int64_t task_begin, int64_t task_end) {
  const Posterior p = looked_up(problem.posterior, problem.at);
  const int divergence = problem.divergence;
  PriorSpan<F> prior(p.prior);
  SpanNoise noise(p);
  Tile<F> mu_scratch, rho_scratch, sigma, log_sigma, weight_scratch, eps_scratch;
  for (int64_t t = task_begin; t < task_end; ++t) {
    double sum = 0;
    for_looked_up<F>(p, problem.at, divergence != kNone, t, [&](const Span& span, const Span& found, int64_t draw) {
      const auto* mu = load_span<F>(p.mu, p.type, p.columns, found, 0, mu_scratch);
      const auto* rho = load_span<F>(p.rho, p.type, p.columns, found, -INFINITY, rho_scratch);
      if (divergence != kNone) prior.move_to(p, found);
      Sum<F> kl;
      sigma_span<F>(p, divergence, mu, rho, span.width, prior, sigma, log_sigma, kl);
      SpanOutput<F> weight(problem.weight, p.type, p.columns, span, weight_scratch);
      if (problem.noise) {
        SpanOutput<F> eps(problem.noise, type_of<ScalarOf<F>>(), p.columns, span, eps_scratch);
        draw_span<F, false, true>(noise, found, draw, divergence, mu, rho, sigma, log_sigma, prior, weight.target, kl, eps.target);
        eps.finish();
      } else {
        draw_span<F>(noise, found, draw, divergence, mu, rho, sigma, log_sigma, prior, weight.target, kl);
      }
      weight.finish();
      if (divergence == kNone) return;
      double value = kl.total();
      if (value != 0) sum += problem.at.weight_of(span.row) * value;  // of a padding row that is not counted no 0 inf
    });
    if (problem.kl) problem.kl[t] = sum;
  }
}

template <class F> inline void rows_backward(const RowsBackward& problem, int64_t task_begin, int64_t task_end) {
  const Posterior p = looked_up(problem.posterior, problem.at);
  GradientSpan<F> gradient(p, problem.divergence, 1, problem.grad_kl);
  const bool with_kl = gradient.divergence != kNone;
  Tile<F> scratch, kept_scratch, eps, weight;
  DrawSpan<F> of{eps, gradient.divergence == kSampled ? weight.data : nullptr, nullptr, nullptr, nullptr};
  for (int64_t t = task_begin; t < task_end; ++t)
    for_looked_up<F>(p, problem.at, with_kl, t, [&](const Span& span, const Span& found, int64_t draw) {
      if (with_kl) gradient.weigh(problem.at.weight_of(span.row));
      gradient.move_to(found);
      if (problem.grad_weight) of.grad_weight = load_span<F>(problem.grad_weight, p.type, p.columns, span, 0, scratch);
      if (gradient.through_weights(of) && problem.noise)
        gradient.take(span, load_span<F>(problem.noise, type_of<ScalarOf<F>>(), p.columns, span, 0, kept_scratch), of);
      else if (gradient.through_weights(of))
        gradient.draw(found, draw, of);
      gradient.finish(span, of, problem.grad_mu, problem.grad_rho);
    });
}

// Sums in the order of the look-ups, whatever the threads: each has rows of the table of its own, and looks through them all.
template <class S> inline void rows_added(const RowsAdded& problem, int64_t task_begin, int64_t task_end) {
  const int64_t columns = problem.columns, per_task = problem.rows_per_task(), row_size = columns * size_of(problem.type);
  const int64_t begin = task_begin * per_task, last = task_end * per_task, end = last < problem.at.table ? last : problem.at.table;
  if (begin >= end || columns == 0) return;
  for (void* sums : problem.sums) memset(static_cast<char*>(sums) + begin * row_size, 0, (end - begin) * row_size);
  alignas(64) S sum[kTile], value[kTile];
  for (int64_t i = 0; i < problem.at.count; ++i) {
    int64_t row = problem.at.rows[i];
    if (row < begin || row >= end) continue;
    for (int k = 0; k < 2; ++k)
      for (int64_t c = 0; c < columns; c += kTile) {
        int64_t n = columns - c < kTile ? columns - c : kTile;
        convert_from(problem.sums[k], problem.type, row * columns + c, n, sum);
        convert_from(problem.values[k], problem.type, i * columns + c, n, value);
        for (int64_t j = 0; j < n; ++j) sum[j] += value[j];
        convert_to(sum, n, problem.sums[k], problem.type, row * columns + c);
      }
  }
}

BNN_FAST_END
