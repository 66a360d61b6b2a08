// The estimators that need less noise than weights, or less of it in common: small batches in one pass over mu and rho, with two
// products at a time and nothing as large as the weights written.
//
//   local    m = x mu^T + mu_b,  v = x^2 (sigma^2)^T + sigma_b^2,  y = m + sqrt(v) eps, one eps for each example and output
//            (Kingma, Salimans, Welling, "Variational dropout and the local reparameterization trick", 2015)
//   flipout  y = x mu^T + ((x s) (sigma eps)^T) r + b, eps shared by the batch, signs s and r of each example's inputs and outputs
//            (Wen, Vicol, Ba, Tran, Grosse, "Flipout: efficient pseudo-independent weight perturbations on mini-batches", 2018)
//
// Both are two products of an input and a matrix,
//
//   forward    x mu^T,  z q^T                 local: z = x^2, q = sigma^2        flipout: z = x s, q = sigma eps
//   backward   M = g^T x,  D = h^T z          local: h = g eps / sqrt(v)         flipout: h = g r
//              dx = g mu + f (h q)            local: f = x                       flipout: f = s
//              dmu = M,  dsigma =             local: sigma D                     flipout: eps D
//
// where h = 0 if v = 0. Tasks, tiles and products are those of linear.h, one product after the other over each tile.
#pragma once

#include "linear.h"

BNN_FAST_BEGIN

template <class F, int R>
inline void estimated_rows(const EstimatedForward& problem, int64_t row, PriorSpan<F>& prior, const SpanNoise& noise, F* first,
                           F* other, Sum<F>& kl) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  const Posterior& p = problem.weight;
  int64_t end = padded_columns<F>(p), all = problem.activations();
  bool local = problem.estimator == kLocal;
  Tile<F> mu_scratch[R], rho_scratch[R], log_sigma[R], sigma[R], unused;
  alignas(64) S second[R * kTile];
  const S *mu[R], *rho[R];
  RowsOfTile<S, R> q(second);
  for (int64_t i = 0; i < all * R; ++i) first[i] = other[i] = splat<F>(0);
  for (int64_t c = 0; c < end; c += kTile) {
    Span spans[R];
    for (int r = 0; r < R; ++r) {
      Span& span = spans[r] = span_at(p, row + r, c, end);
      mu[r] = load_span<F>(p.mu, p.type, p.columns, span, 0, mu_scratch[r]);
      rho[r] = load_span<F>(p.rho, p.type, p.columns, span, -INFINITY, rho_scratch[r]);
      if (problem.divergence == kAnalytic) prior.move_to(p, span);
      prefetch(p, span.row, span.first + span.width, span.width);
      sigma_span<F>(p, problem.divergence, mu[r], rho[r], span.width, prior, sigma[r], log_sigma[r], kl);
      if (!local) continue;
      for (int i = 0; i < span.width; i += W) store<F>(second + r * kTile + i, variance(load<F>(sigma[r] + i)));
    }
    const S *x = static_cast<const S*>(problem.x) + c * all, *z = static_cast<const S*>(problem.second) + c * all;
    int vectors = spans[0].width / W;
    multiply_tile<F, R>(mu, x, all, all, vectors, first);
    if (local) multiply_tile<F, R>(q.at, z, all, all, vectors, other);
    for (int64_t s = 0; s < problem.samples && (!local || problem.divergence == kSampled); ++s) {
      for (int r = 0; r < R; ++r) {
        if (problem.divergence == kSampled) prior.move_to(p, spans[r]);
        if (local)
          draw_span<F>(noise, spans[r], s, problem.divergence, mu[r], rho[r], sigma[r], log_sigma[r], prior, unused, kl);
        else
          draw_span<F, true>(noise, spans[r], s, problem.divergence, mu[r], rho[r], sigma[r], log_sigma[r], prior,
                             second + r * kTile, kl);
      }
      int64_t row_of_x = s * problem.batch;
      if (!local) multiply_tile<F, R>(q.at, z + row_of_x * W, all, problem.batch, vectors, other + row_of_x * R);
    }
  }
  S *first_sum = static_cast<S*>(problem.first_sum), *second_sum = static_cast<S*>(problem.second_sum);
  for (int64_t b = 0; b < all; ++b) {
    sum_lanes_of<F, R>(first + b * R, first_sum + b * p.rows + row);
    sum_lanes_of<F, R>(other + b * R, second_sum + b * p.rows + row);
  }
}

template <class F> inline void estimated_forward(const EstimatedForward& problem, int64_t task_begin, int64_t task_end) {
  const Posterior& p = problem.weight;
  PriorSpan<F> prior(p.prior);
  SpanNoise noise(p);
  int64_t size = problem.activations() * kOutputsPerTask;
  auto first = aligned_array<F>(size), other = aligned_array<F>(size);
  for (int64_t t = task_begin; t < task_end; ++t) {
    Sum<F> kl;
    int64_t row = t * kOutputsPerTask, end = row + kOutputsPerTask < p.rows ? row + kOutputsPerTask : p.rows;
    by_row_blocks<F>([&] { return end - row; }, [&]<int R>() {
      estimated_rows<F, R>(problem, row, prior, noise, first.get(), other.get(), kl);
      row += R;
    });
    if (problem.kl) problem.kl[t] = kl.total();
  }
}

// A task of the backward owns a block of outputs and has a part of dx: it walks memory in order, which a block of inputs would not.
// Columns are taken as many at a time as have their activations in the L1 cache.
constexpr int64_t kColumnsInCache = 2048;  // of one activations' row

// What the backward has of the activations: x, z, and parts of g mu and of h q from a column on, packed.
template <class S> struct Activations {
  const S *x, *z;
  S *by_mu, *by_q;  // or null

  Activations from(int64_t element) const {
    return {x + element, z + element, by_mu ? by_mu + element : nullptr, by_q ? by_q + element : nullptr};
  }
};

// by[r] = sum_b g[b][r] x[b], and back[b] += sum_r g[b][r] w[r] unless that is null, over a span.
template <class F, int R>
BNN_FN void outer(const ScalarOf<F>* const (&w)[R], const ScalarOf<F>* g, const ScalarOf<F>* x, ScalarOf<F>* back, int64_t stride,
                  int64_t batch, int vectors, ScalarOf<F>* by) {
  if (back)
    outer_tile<F, R, true>(w, g, x, stride, back, stride, batch, vectors, by);
  else
    outer_tile<F, R, false>(w, g, x, stride, nullptr, stride, batch, vectors, by);
}

template <class F, int R>
inline void estimated_backward_rows(const EstimatedBackward& problem, int64_t row, int64_t begin, int64_t end,
                                    const ScalarOf<F>* g, const ScalarOf<F>* h, const Activations<ScalarOf<F>>& at,
                                    GradientSpan<F>* gradient) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  const Posterior& p = problem.weight;
  int64_t all = problem.activations();
  bool local = problem.estimator == kLocal;
  alignas(64) S second[R * kTile], by_first[R * kTile], by_second[R * kTile], by_mu[R * kTile], by_sigma[R * kTile];
  alignas(64) S eps[R * kTile], weight[R * kTile];
  Span spans[R];
  DrawSpan<F> draws[R];
  const S* mu[R];
  for (int r = 0; r < R; ++r) {
    int tile = r * kTile;
    draws[r] = {eps + tile, gradient[r].divergence == kSampled ? weight + tile : nullptr, nullptr, by_mu + tile, by_sigma + tile,
                by_first + tile, local ? by_second + tile : nullptr};
    spans[r] = span_at(p, row + r, begin, end);
    gradient[r].move_to(spans[r]);
    mu[r] = gradient[r].mu;
    prefetch(p, spans[r].row + R, spans[r].first, spans[r].width);
    for (int i = 0; i < spans[r].width && local; i += W) store<F>(second + tile + i, variance(load<F>(gradient[r].sigma + i)));
  }
  int vectors = spans[0].width / W;
  RowsOfTile<S, R> q(second);
  outer<F, R>(mu, g, at.x, at.by_mu, all, all, vectors, by_first);
  if (local) outer<F, R>(q.at, h, at.z, at.by_q, all, all, vectors, by_second);
  for (int r = 0; r < R; ++r) gradient[r].start(spans[r], draws[r]);
  for (int64_t s = 0; s < problem.samples && (!local || gradient[0].divergence == kSampled); ++s) {
    for (int r = 0; r < R; ++r) {
      gradient[r].draw(spans[r], s, draws[r]);
      for (int i = 0; i < spans[r].width && !local; i += W)
        store<F>(second + r * kTile + i, load<F>(gradient[r].sigma + i) * load<F>(draws[r].eps + i));
    }
    int64_t first = s * problem.batch;
    Activations<S> of_sample = at.from(first * W);
    if (!local) outer<F, R>(q.at, h + first * kGradientOutputs, of_sample.z, of_sample.by_q, all, problem.batch, vectors, by_second);
    for (int r = 0; r < R; ++r) gradient[r].add_draw(spans[r], draws[r], local ? nullptr : by_second + r * kTile);
  }
  for (int r = 0; r < R; ++r) gradient[r].finish(spans[r], draws[r], problem.grad_mu, problem.grad_rho);
}

template <class F> inline void estimated_backward(const EstimatedBackward& problem, int64_t task_begin, int64_t task_end) {
  using S = ScalarOf<F>;
  const Posterior& p = problem.weight;
  int64_t padded = padded_columns<F>(p), all = problem.activations(), size = problem.grad_x ? padded * all : 0;
  int64_t block = kColumnsInCache / (all * kTile + 1) * kTile, row_count = EstimatedBackward::rows_per_task(p.rows);
  if (block < kTile) block = kTile;
  auto gradient = [&] { return GradientSpan<F>(p, problem.divergence, problem.samples, problem.grad_kl, problem.estimator); };
  GradientSpan<F> gradients[] = {gradient(), gradient(), gradient(), gradient(), gradient(), gradient(), gradient(), gradient()};
  auto g = aligned_array<S>(kGradientOutputs * all), h = aligned_array<S>(kGradientOutputs * all), by_q = aligned_array<S>(size);
  const S *x = static_cast<const S*>(problem.x), *z = static_cast<const S*>(problem.second), *f = static_cast<const S*>(problem.factor);
  for (int64_t t = task_begin; t < task_end; ++t) {
    S* part = static_cast<S*>(problem.grad_x) + t * size;
    Activations<S> activations{x, z, size > 0 ? part : nullptr, size > 0 ? by_q.get() : nullptr};
    for (int64_t i = 0; i < size; ++i) part[i] = by_q[i] = 0;
    int64_t task_stop = (t + 1) * row_count < p.rows ? (t + 1) * row_count : p.rows;
    for (int64_t block_begin = 0; block_begin < padded; block_begin += block)
      for (int64_t row = t * row_count; row < task_stop;) {
        int64_t first = row, stop = row + kGradientOutputs < task_stop ? row + kGradientOutputs : task_stop;
        for (int64_t b = 0; b < all; ++b) {
          size_t bytes = sizeof(S) * static_cast<size_t>(stop - row);
          memcpy(g.get() + b * kGradientOutputs, static_cast<const S*>(problem.grad) + b * p.rows + row, bytes);
          memcpy(h.get() + b * kGradientOutputs, static_cast<const S*>(problem.grad_second) + b * p.rows + row, bytes);
        }
        by_row_blocks<F>([&] { return stop - row; }, [&]<int R>() {
          for (int64_t c = block_begin; c < block_begin + block && c < padded; c += kTile)
            estimated_backward_rows<F, R>(problem, row, c, padded, g.get() + (row - first), h.get() + (row - first),
                                          activations.from(c * all), gradients);
          row += R;
        });
      }
    for (int64_t i = 0; i < size; ++i) part[i] += f[i] * by_q[i];
  }
}

template <class F> inline void local_outputs(const LocalOutputs& problem, int64_t task_begin, int64_t task_end) {
  using S = ScalarOf<F>;
  const Posterior& p = problem.posterior;
  SpanNoise noise(p);
  int64_t elements = p.rows * p.columns;
  Tile<F> mean_scratch, variance_scratch, y_scratch, kept_scratch;
  for (int64_t t = task_begin; t < task_end; ++t)
    for_spans<F>(p, t, [&](const Span& span) {
      for (int64_t s = 0; s < problem.samples; ++s) {
        auto at = [&](const void* data, Type type, bool shared = false) {
          return const_cast<char*>(static_cast<const char*>(data)) + (shared ? 0 : s * elements * size_of(type));
        };
        const S* m = load_span<F>(at(p.mu, p.type, problem.shared), p.type, p.columns, span, 0, mean_scratch);
        const S* v = load_span<F>(at(p.rho, p.type, problem.shared), p.type, p.columns, span, 0, variance_scratch);
        SpanOutput<F> y(at(problem.y, problem.y_type), problem.y_type, p.columns, span, y_scratch);
        SpanOutput<F> kept(at(problem.kept, p.type), p.type, p.columns, span, kept_scratch);
        noise.draw<F>(span, s, [&](int i, F eps) __attribute__((always_inline)) {
          F square = load<F>(v + i);
          auto none = square < std::numeric_limits<S>::min();  // or square roots and quotients of what has few digits
          F root = sqrt_lane(select(none, splat<F>(1), square));
          store<F>(kept.target + i, select(none, splat<F>(0), eps / root));
          store<F>(y.target + i, select(none, load<F>(m + i), fma_lane(root, eps, load<F>(m + i))));
        });
        y.finish();
        kept.finish();
      }
    });
}

BNN_FAST_END
