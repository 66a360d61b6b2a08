// Sampling a tensor's weights with the KL of its elements, span by span; the backward is in gradient.h.
//
//   w_s = mu + sigma(rho) eps_s           KL summed on the way, sigma computed once for all samples
#pragma once

#include "factorised.h"

BNN_FAST_BEGIN

// Sigma over a span, and the analytic KL of its elements where it is asked for. Pruned and padded elements add nothing.
template <class F>
inline void sigma_span(const Posterior& p, int divergence, const ScalarOf<F>* mu, const ScalarOf<F>* rho, int width,
                       PriorSpan<F>& prior, ScalarOf<F>* sigma, ScalarOf<F>* log_sigma, Sum<F>& kl) {
  using G = Group<F>;
  constexpr int W = Lane<F>::width, step = Lane<G>::width;
  with_scale(p.scale, [&]<int scale>() {
    if (divergence == kAnalytic) {
      for (int group = 0; group < width; group += 4 * W) {  // four vectors share one logarithm
        F product = splat<F>(1), elements = splat<F>(0);
        for (int i = group; i < group + 4 * W; i += step) {
          G r = load<G>(rho + i);
          Spread<G> s = spread<scale>(r);
          LogSigma<G> log_sigma = split_log<scale>(r, s);
          store<G>(sigma + i, s.sigma);
          G element = kl_analytic(load<G>(mu + i), s.sigma, log_sigma.term, prior.template at<G>(i));
          for_parts<F>(log_sigma.factor, [&](F factor) __attribute__((always_inline)) { product *= factor; });
          for_parts<F>(select(is_pruned(r), splat<G>(0), element), [&](F part) __attribute__((always_inline)) { elements += part; });
        }
        kl.add(scale == kSoftplus ? elements - log_lane(product) : elements);
      }
    } else if (divergence == kSampled) {
      for (int i = 0; i < width; i += step) {
        Spread<G> s = spread<scale>(load<G>(rho + i));
        store<G>(sigma + i, s.sigma);
        store<G>(log_sigma + i, s.log_sigma);
      }
    } else {
      for (int i = 0; i < width; i += step) store<G>(sigma + i, spread<scale>(load<G>(rho + i)).sigma);
    }
  });
}

// One draw of a span's weights, or of sigma eps alone, and the sampled KL of its elements where it is asked for; the noise too if
// `kept` says so.
template <class F, bool alone = false, bool kept = false>
inline void draw_span(const SpanNoise& noise, const Span& span, int64_t sample, int divergence, const ScalarOf<F>* mu,
                      const ScalarOf<F>* rho, const ScalarOf<F>* sigma, const ScalarOf<F>* log_sigma, PriorSpan<F>& prior,
                      ScalarOf<F>* weight, Sum<F>& kl, ScalarOf<F>* to = nullptr) {
  noise.draw<F>(span, sample, [&](int i, F eps) __attribute__((always_inline)) {
    F w = fma_lane(load<F>(sigma + i), eps, load<F>(mu + i));
    store<F>(weight + i, alone ? load<F>(sigma + i) * eps : w);
    if constexpr (kept) store<F>(to + i, eps);
    if (divergence == kSampled) {
      F element = kl_sampled(w, eps, load<F>(log_sigma + i), prior.at(i));
      kl.add(select(is_pruned(load<F>(rho + i)), splat<F>(0), element));
    }
  });
}

// Calls body(span) for the spans of task t.
template <class F, class Body> inline void for_spans(const Posterior& p, int64_t t, Body body) {
  Tasks tasks(p);
  int64_t row_begin = t / tasks.across * tasks.rows_per_task;
  int64_t row_end = row_begin + tasks.rows_per_task < p.rows ? row_begin + tasks.rows_per_task : p.rows;
  int64_t begin = t % tasks.across * tasks.columns_per_task;
  int64_t end = padded_columns<F>(p);
  if (tasks.across > 1 && begin + tasks.columns_per_task < end) end = begin + tasks.columns_per_task;
  if (0 < row_pitch(p) && 2 * row_pitch(p) <= kTile) {
    for (int64_t row = row_begin; row < row_end;) {
      Span span = span_of_rows<F>(p, row, row_end);
      body(span);
      row += span.rows;
    }
    return;
  }
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t column = begin; column < end; column += kTile) body(span_at(p, row, column, end));
}

template <class F> inline void sample_forward(const SampleForward& problem, int64_t task_begin, int64_t task_end) {
  const Posterior& p = problem.posterior;
  PriorSpan<F> prior(p.prior);
  SpanNoise noise(p);
  int64_t stride = p.rows * p.columns * size_of(problem.weight_type);
  Tile<F> mu_scratch, rho_scratch, sigma, log_sigma, weight_scratch, eps_scratch;
  for (int64_t t = task_begin; t < task_end; ++t) {
    Sum<F> kl;
    for_spans<F>(p, t, [&](const Span& span) {
      if (p.column_factors) {
        SpanOutput<F> weight(problem.weight, problem.weight_type, p.columns, span, weight_scratch);
        factorised_weights<F>(p, span, mu_scratch, weight.target);
        return weight.finish();
      }
      const auto* mu = load_span<F>(p.mu, p.type, p.columns, span, 0, mu_scratch);
      const auto* rho = load_span<F>(p.rho, p.type, p.columns, span, -INFINITY, rho_scratch);
      if (problem.divergence != kNone) prior.move_to(p, span);
      sigma_span<F>(p, problem.divergence, mu, rho, span.width, prior, sigma, log_sigma, kl);
      if (!problem.weight && problem.divergence != kSampled) return;
      if (problem.estimator == kLocal) {
        SpanOutput<F> squares(problem.weight, problem.weight_type, p.columns, span, weight_scratch);
        for (int i = 0; i < span.width; i += Lane<F>::width) store<F>(squares.target + i, variance(load<F>(sigma.data + i)));
        squares.finish();
        if (problem.divergence != kSampled) return;
      }
      for (int64_t s = 0; s < problem.samples; ++s) {
        if (!problem.weight || problem.estimator == kLocal) {
          draw_span<F>(noise, span, s, problem.divergence, mu, rho, sigma, log_sigma, prior, weight_scratch, kl);
          continue;
        }
        SpanOutput<F> weight(static_cast<char*>(problem.weight) + s * stride, problem.weight_type, p.columns, span,
                             weight_scratch);
        if (problem.noise) {
          SpanOutput<F> eps(static_cast<char*>(problem.noise) + s * stride, problem.weight_type, p.columns, span, eps_scratch);
          draw_span<F, false, true>(noise, span, s, problem.divergence, mu, rho, sigma, log_sigma, prior, weight.target, kl, eps.target);
          eps.finish();
        } else if (problem.estimator == kFlipout)
          draw_span<F, true>(noise, span, s, problem.divergence, mu, rho, sigma, log_sigma, prior, weight.target, kl);
        else
          draw_span<F>(noise, span, s, problem.divergence, mu, rho, sigma, log_sigma, prior, weight.target, kl);
        weight.finish();
      }
    });
    if (problem.kl) problem.kl[t] = kl.total();
  }
}

template <class F> inline void kl_elements(const KlElements& problem, int64_t task_begin, int64_t task_end) {
  const Posterior& p = problem.posterior;
  PriorSpan<F> prior(p.prior);
  Tile<F> mu_scratch, rho_scratch, kl;
  for (int64_t t = task_begin; t < task_end; ++t)
    for_spans<F>(p, t, [&](const Span& span) {
      const auto* mu = load_span<F>(p.mu, p.type, p.columns, span, 0, mu_scratch);
      const auto* rho = load_span<F>(p.rho, p.type, p.columns, span, -INFINITY, rho_scratch);
      prior.move_to(p, span);
      with_scale(p.scale, [&]<int scale>() {
        for (int i = 0; i < span.width; i += Lane<F>::width) {
          F r = load<F>(rho + i);
          F element = kl_analytic(load<F>(mu + i), spread<scale>(r), prior.at(i));
          store<F>(kl + i, select(is_pruned(r), splat<F>(0), element));
        }
      });
      store_span<F>(problem.kl, p.type, p.columns, span, kl);
    });
}

BNN_FAST_END
