// Factorised noise (Fortunato et al., "Noisy networks for exploration", 2018): the weights of a draw and their gradients, where
// eps[o, i] = row[o] column[i] and sigma = rho. No noise is drawn for a weight, so there is less to do for one than in sample.h:
//
//   forward    w = mu + sigma row column           backward   dmu = dW,  dsigma = dW row column
#pragma once

#include "span.h"

BNN_FAST_BEGIN

// Calls body(eps), eps(i) being the noise of the span's vector from element i on.
template <class F, class Body> BNN_FN void with_factors(const Posterior& p, const Span& span, Body body) {
  using S = ScalarOf<F>;
  const S* columns = static_cast<const S*>(p.column_factors) + span.first;
  auto row = [&](int r) { return p.row_factors ? static_cast<const S*>(p.row_factors)[span.row + r] : S(1); };
  if (span.rows == 1) {
    F factor = splat<F>(row(0));
    return body([&](int i) __attribute__((always_inline)) { return factor * load<F>(columns + i); });
  }
  Tile<F> eps;
  for (int r = 0, i = 0; i < span.width; ++r)  // behind the last row is padding
    for (int c = 0; c < span.pitch && i < span.width; ++c, ++i) eps[i] = r < span.rows ? row(r) * columns[c] : 0;
  body([&](int i) __attribute__((always_inline)) { return load<F>(eps + i); });
}

template <class F> BNN_FN F factorised_weight(F mu, F sigma, F eps) { return fma_lane(spread<kIdentity>(sigma).sigma, eps, mu); }

// The weights of a span. `scratch`: a tile.
template <class F> inline void factorised_weights(const Posterior& p, const Span& span, ScalarOf<F>* scratch, ScalarOf<F>* weight) {
  Tile<F> sigma_scratch;
  const auto* mu = load_span<F>(p.mu, p.type, p.columns, span, 0, scratch);
  const auto* sigma = load_span<F>(p.rho, p.type, p.columns, span, -INFINITY, sigma_scratch);
  with_factors<F>(p, span, [&](auto eps) __attribute__((always_inline)) {
    for (int i = 0; i < span.width; i += Lane<F>::width)
      store<F>(weight + i, factorised_weight(load<F>(mu + i), load<F>(sigma + i), eps(i)));
  });
}

// The gradients of a span from that of its weights; null if there is none.
template <class F>
inline void factorised_gradients(const Posterior& p, const Span& span, const ScalarOf<F>* grad_weight, void* grad_mu, void* grad_sigma) {
  Tile<F> sigma_scratch, mu_out, sigma_out;
  const auto* sigma = load_span<F>(p.rho, p.type, p.columns, span, -INFINITY, sigma_scratch);
  SpanOutput<F> d_mu(grad_mu, p.type, p.columns, span, mu_out), d_sigma(grad_sigma, p.type, p.columns, span, sigma_out);
  with_factors<F>(p, span, [&](auto eps) __attribute__((always_inline)) {
    F zero = splat<F>(0);
    for (int i = 0; i < span.width; i += Lane<F>::width) {
      F g = grad_weight ? load<F>(grad_weight + i) : zero;
      auto pruned = is_pruned(load<F>(sigma + i));
      store<F>(d_mu.target + i, select(pruned, zero, g));
      store<F>(d_sigma.target + i, select(pruned, zero, g * eps(i)));
    }
  });
  d_mu.finish();
  d_sigma.finish();
}

BNN_FAST_END
