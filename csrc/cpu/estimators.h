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
// where h = 0 if v = 0. Activations are packed as in linear.h.
#pragma once

#include "linear.h"

BNN_FAST_BEGIN

// sums[b][r] += (first[r] . x[b], second[r] . z[b]) over a span, for B rows of the batch and R of kRowBlock rows of weights.
template <class F, int R, int B>
BNN_FN void multiply_two(const ScalarOf<F>* const* first, const ScalarOf<F>* second, const ScalarOf<F>* x, const ScalarOf<F>* z,
                         int64_t stride, int vectors, F* sums, int rows) {
  constexpr int W = Lane<F>::width;
  F a[B][R], d[B][R];
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) a[b][r] = d[b][r] = splat<F>(0);
  for (int v = 0; v < vectors; ++v, x += stride * W, z += stride * W) {
    for (int b = 0; b < B; ++b) {
      F input = load<F>(x + b * W), other = load<F>(z + b * W);
      for (int r = 0; r < R; ++r) {
        a[b][r] = fma_lane(load<F>(first[r] + v * W), input, a[b][r]);
        d[b][r] = fma_lane(load<F>(second + r * kTile + v * W), other, d[b][r]);
      }
    }
  }
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) {
      sums[(b * rows + r) * 2] += a[b][r];
      sums[(b * rows + r) * 2 + 1] += d[b][r];
    }
}

template <class F, int R>
inline void multiply_two_tiles(const ScalarOf<F>* const* first, const ScalarOf<F>* second, const ScalarOf<F>* x,
                               const ScalarOf<F>* z, int64_t stride, int64_t batch, int vectors, F* sums) {
  constexpr int W = Lane<F>::width;
  constexpr int P = R < (W == 16 ? 4 : 2) ? R : (W == 16 ? 4 : 2);  // 4 P sums and 2 P weights stay in registers
  for (int r = 0; r < R; r += P) {
    int64_t b = 0;
    F* to = sums + 2 * r;
    const ScalarOf<F>* q = second + r * kTile;
    for (; b + 2 <= batch; b += 2) multiply_two<F, P, 2>(first + r, q, x + b * W, z + b * W, stride, vectors, to + b * R * 2, R);
    for (; b < batch; ++b) multiply_two<F, P, 1>(first + r, q, x + b * W, z + b * W, stride, vectors, to + b * R * 2, R);
  }
}

template <class F, int R>
inline void estimated_rows(const EstimatedForward& problem, int64_t row, PriorSpan<F>& prior, const SpanNoise& noise, F* sums,
                           Sum<F>& kl) {
  using S = ScalarOf<F>;
  constexpr int W = Lane<F>::width;
  const Posterior& p = problem.weight;
  int64_t end = padded_columns<F>(p), all = problem.activations();
  bool local = problem.estimator == kLocal;
  Tile<F> mu_scratch[R], rho_scratch[R], log_sigma[R], sigma[R], unused;
  alignas(64) S second[R * kTile];
  const S *mu[R], *rho[R];
  for (int64_t i = 0; i < all * R * 2; ++i) sums[i] = splat<F>(0);
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
    if (local) multiply_two_tiles<F, R>(mu, second, x, z, all, all, vectors, sums);
    for (int64_t s = 0; s < problem.samples && (!local || problem.divergence == kSampled); ++s) {
      for (int r = 0; r < R; ++r) {
        if (problem.divergence == kSampled) prior.move_to(p, spans[r]);
        if (local)
          draw_span<F>(noise, spans[r], s, problem.divergence, mu[r], rho[r], sigma[r], log_sigma[r], prior, unused, kl);
        else
          draw_span<F, true>(noise, spans[r], s, problem.divergence, mu[r], rho[r], sigma[r], log_sigma[r], prior,
                             second + r * kTile, kl);
      }
      int64_t first = s * problem.batch;
      if (!local)
        multiply_two_tiles<F, R>(mu, second, x + first * W, z + first * W, all, problem.batch, vectors, sums + first * R * 2);
    }
  }
  S *first_sum = static_cast<S*>(problem.first_sum), *second_sum = static_cast<S*>(problem.second_sum);
  for (int64_t b = 0; b < all; ++b)
    for (int r = 0; r < R; ++r) {
      first_sum[b * p.rows + row + r] = sum_lanes(sums[(b * R + r) * 2]);
      second_sum[b * p.rows + row + r] = sum_lanes(sums[(b * R + r) * 2 + 1]);
    }
}

template <class F> inline void estimated_forward(const EstimatedForward& problem, int64_t task_begin, int64_t task_end) {
  const Posterior& p = problem.weight;
  PriorSpan<F> prior(p.prior);
  SpanNoise noise(p);
  auto sums = aligned_array<F>(problem.activations() * kRowBlock * 2);
  for (int64_t t = task_begin; t < task_end; ++t) {
    Sum<F> kl;
    int64_t row = t * kRowBlock;
    if (row + kRowBlock <= p.rows) {
      estimated_rows<F, kRowBlock>(problem, row, prior, noise, sums.get(), kl);
    } else {
      for (; row < p.rows; ++row) estimated_rows<F, 1>(problem, row, prior, noise, sums.get(), kl);
    }
    if (problem.kl) problem.kl[t] = kl.total();
  }
}

// A task of the backward owns a block of outputs and has a part of dx: it walks memory in order, which a block of inputs would not.
// Columns are taken as many at a time as have their activations in the L1 cache.
constexpr int64_t kColumnsInCache = 2048;  // of one activations' row

// What the backward has of the activations: x, z, f and a part of dx from a column on, packed.
template <class S> struct Activations {
  const S *x, *z, *f;
  S* grad_x;  // or null
};

// by_first[r] = sum_b g[b][r] x[b], by_second[r] = sum_b h[b][r] z[b], grad_x[b] += sum_r g[b][r] first[r] + f[b] h[b][r] second[r]
// over a span; g and h have rows of kGradientOutputs.
template <class F, int R, bool with_x>
BNN_FN void outer_two(const ScalarOf<F>* const* first, const ScalarOf<F>* second, const ScalarOf<F>* g, const ScalarOf<F>* h,
                      const Activations<ScalarOf<F>>& at, int64_t stride, int64_t batch, int vectors, ScalarOf<F>* by_first,
                      ScalarOf<F>* by_second) {
  constexpr int W = Lane<F>::width;
  for (int v = 0; v < vectors; ++v) {
    F mu[R], q[R], a[R], d[R];
    for (int r = 0; r < R; ++r) {
      mu[r] = load<F>(first[r] + v * W);
      q[r] = load<F>(second + r * kTile + v * W);
      a[r] = d[r] = splat<F>(0);
    }
    int64_t o = v * stride * W;
    for (int64_t b = 0; b < batch; ++b, o += W) {
      F input = load<F>(at.x + o), other = load<F>(at.z + o), back = splat<F>(0), scaled = splat<F>(0);
      for (int r = 0; r < R; ++r) {
        F of_first = splat<F>(g[b * kGradientOutputs + r]), of_second = splat<F>(h[b * kGradientOutputs + r]);
        a[r] = fma_lane(of_first, input, a[r]);
        d[r] = fma_lane(of_second, other, d[r]);
        if (with_x) back = fma_lane(of_first, mu[r], back), scaled = fma_lane(of_second, q[r], scaled);
      }
      if (with_x) store<F>(at.grad_x + o, load<F>(at.grad_x + o) + fma_lane(load<F>(at.f + o), scaled, back));
    }
    for (int r = 0; r < R; ++r) {
      store<F>(by_first + r * kTile + v * W, a[r]);
      store<F>(by_second + r * kTile + v * W, d[r]);
    }
  }
}

template <class F, int R>
inline void outer_two_tiles(const ScalarOf<F>* const* first, const ScalarOf<F>* second, const ScalarOf<F>* g, const ScalarOf<F>* h,
                            const Activations<ScalarOf<F>>& at, int64_t stride, int64_t batch, int vectors,
                            ScalarOf<F>* by_first, ScalarOf<F>* by_second) {
  constexpr int P = R < (Lane<F>::width == 16 ? 4 : 2) ? R : (Lane<F>::width == 16 ? 4 : 2);
  for (int r = 0; r < R; r += P) {
    auto run = [&]<bool with_x>() __attribute__((always_inline)) {
      outer_two<F, P, with_x>(first + r, second + r * kTile, g + r, h + r, at, stride, batch, vectors, by_first + r * kTile,
                              by_second + r * kTile);
    };
    if (at.grad_x)
      run.template operator()<true>();
    else
      run.template operator()<false>();
  }
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
    draws[r] = {eps + tile, gradient[r].divergence == kSampled ? weight + tile : nullptr, nullptr, by_mu + tile, by_sigma + tile};
    spans[r] = span_at(p, row + r, begin, end);
    gradient[r].move_to(spans[r]);
    mu[r] = gradient[r].mu;
    prefetch(p, spans[r].row + R, spans[r].first, spans[r].width);
    if (local)
      draws[r].first = by_first + tile, draws[r].second = by_second + tile;
    else
      gradient[r].start(spans[r], draws[r]);
    for (int i = 0; i < spans[r].width && local; i += W) store<F>(second + tile + i, variance(load<F>(gradient[r].sigma + i)));
  }
  int vectors = spans[0].width / W;
  if (local) {
    outer_two_tiles<F, R>(mu, second, g, h, at, all, all, vectors, by_first, by_second);
    for (int r = 0; r < R; ++r) gradient[r].start(spans[r], draws[r]);
  }
  for (int64_t s = 0; s < problem.samples && (!local || gradient[0].divergence == kSampled); ++s) {
    for (int r = 0; r < R; ++r) {
      gradient[r].draw(spans[r], s, draws[r]);
      for (int i = 0; i < spans[r].width && !local; i += W)
        store<F>(second + r * kTile + i, load<F>(gradient[r].sigma + i) * load<F>(draws[r].eps + i));
    }
    int64_t first = s * problem.batch, o = first * kGradientOutputs;
    Activations<S> of_sample{at.x + first * W, at.z + first * W, at.f + first * W, at.grad_x ? at.grad_x + first * W : nullptr};
    if (!local) outer_two_tiles<F, R>(mu, second, g + o, h + o, of_sample, all, problem.batch, vectors, by_first, by_second);
    for (int r = 0; r < R; ++r) {
      for (int i = r * kTile; i < r * kTile + spans[r].width && !local; i += W)
        store<F>(by_mu + i, load<F>(by_mu + i) + load<F>(by_first + i));
      gradient[r].add_draw(spans[r], draws[r], local ? nullptr : by_second + r * kTile);
    }
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
  GradientSpan<F> gradients[kRowBlock] = {gradient(), gradient(), gradient(), gradient()};
  auto g = aligned_array<S>(kGradientOutputs * all), h = aligned_array<S>(kGradientOutputs * all);
  for (int64_t t = task_begin; t < task_end; ++t) {
    S* part = static_cast<S*>(problem.grad_x) + t * size;
    for (int64_t i = 0; i < size; ++i) part[i] = 0;
    int64_t task_stop = (t + 1) * row_count < p.rows ? (t + 1) * row_count : p.rows;
    for (int64_t block_begin = 0; block_begin < padded; block_begin += block)
      for (int64_t row = t * row_count; row < task_stop;) {
        int64_t first = row, stop = row + kGradientOutputs < task_stop ? row + kGradientOutputs : task_stop;
        for (int64_t b = 0; b < all; ++b) {
          size_t bytes = sizeof(S) * static_cast<size_t>(stop - row);
          memcpy(g.get() + b * kGradientOutputs, static_cast<const S*>(problem.grad) + b * p.rows + row, bytes);
          memcpy(h.get() + b * kGradientOutputs, static_cast<const S*>(problem.grad_second) + b * p.rows + row, bytes);
        }
        auto rows = [&]<int R>() {
          for (int64_t c = block_begin; c < block_begin + block && c < padded; c += kTile) {
            auto at = [&](const void* packed) { return static_cast<const S*>(packed) + c * all; };
            Activations<S> here{at(problem.x), at(problem.second), at(problem.factor), problem.grad_x ? part + c * all : nullptr};
            estimated_backward_rows<F, R>(problem, row, c, padded, g.get() + (row - first), h.get() + (row - first), here, gradients);
          }
          row += R;
        };
        while (row + kRowBlock <= stop) rows.template operator()<kRowBlock>();
        while (row < stop) rows.template operator()<1>();
      }
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
