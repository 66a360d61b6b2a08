// The backward of sampling a tensor's weights (sample.h) and of its KL, span by span.
//
//   dmu = sum_s dW_s + k dKL/dmu          drho = sigma' sum_s dW_s eps_s + k dKL/drho
//
// With the sampled divergence k dKL_s/dw_s / S is added to dW_s, and only -(log sigma)' is left in dKL/drho. Of estimators other
// than "weight" there are two gradients in the place of dW, M, and D, which of "local" is the same for all samples (estimators.h):
//
//   dmu = M + k dKL/dmu                   drho = sigma' (sigma D  or of flipout  sum_s eps_s D_s) + k dKL/drho
//
// The noise is drawn again, unless an earlier pass of the backward has left it; nothing is kept from the forward.
#pragma once

#include "sample.h"

BNN_FAST_BEGIN

// Scratch of one draw over a span, and of the sums over several.
template <class F> struct DrawSpan {
  ScalarOf<F>* eps;
  ScalarOf<F>* weight;             // null where nobody asks for it: the sampled divergence does
  const ScalarOf<F>* grad_weight;  // null: no gradient came through the weights
  ScalarOf<F>* by_mu;              // sums over more draws than one
  ScalarOf<F>* by_sigma;
  const ScalarOf<F>* first = nullptr;   // of another estimator, M and D of "local"; null where there are none
  const ScalarOf<F>* second = nullptr;
};

// What the backward needs of a span: w = mu + sigma eps drawn again, and the two gradients put together from
// the gradients by the weights.
template <class F> struct GradientSpan {
  using S = ScalarOf<F>;
  static constexpr int W = Lane<F>::width;

  const Posterior& p;
  int divergence;
  int64_t samples;
  const KlGradient& grad_kl;
  int estimator;
  PriorSpan<F> prior;
  SpanNoise noise;
  const S *mu, *rho;
  Tile<F> sigma, d_sigma, kl_rho;

  GradientSpan(const Posterior& p, int divergence, int64_t samples, const KlGradient& grad_kl, int estimator = kWeight)
      : p(p), divergence(grad_kl.data ? divergence : int(kNone)), samples(samples), grad_kl(grad_kl), estimator(estimator), prior(p.prior), noise(p) {
    if (grad_kl.data && !grad_kl.elementwise) {
      convert_from(grad_kl.data, grad_kl.type, 0, 1, &number);
      weigh(1);
    }
  }

  // From now on the gradient that reaches the KL, a number, counts so much.
  void weigh(double weight) {
    S value = number == 0 ? S(0) : static_cast<S>(number * weight);  // a KL of weight 0 adds nothing
    for (int i = 0; i < kTile; ++i) factor_scratch[i] = value;
  }

  // sigma, and in units (posterior.h) sigma' and the KL's own part of the gradient by rho.
  void move_to(const Span& span) {
    mu = load_span<F>(p.mu, p.type, p.columns, span, 0, mu_scratch);
    rho = load_span<F>(p.rho, p.type, p.columns, span, -INFINITY, rho_scratch);
    if (divergence != kNone) prior.move_to(p, span);
    factor = factor_scratch;
    if (grad_kl.data && grad_kl.elementwise)
      factor = load_span<F>(grad_kl.data, grad_kl.type, p.columns, span, 0, factor_scratch);
    with_scale(p.scale, [&]<int scale>() {
      using G = Group<F>;
      for (int i = 0; i < span.width; i += Lane<G>::width) {
        Spread<G> s = spread<scale>(load<G>(rho + i));
        store<G>(sigma + i, s.sigma);
        store<G>(d_sigma + i, s.d_sigma);
        if (divergence == kAnalytic)
          store<G>(kl_rho + i, times(load<G>(factor + i), kl_by_rho(s, prior.template at<G>(i))));
        else if (divergence == kSampled)
          store<G>(kl_rho + i, times(load<G>(factor + i), sampled_kl_by_rho(s)));
      }
    });
  }

  // One draw: its noise and its weights.
  void draw(const Span& span, int64_t sample, const DrawSpan<F>& to) const {
    S *eps = to.eps, *weight = to.weight;
    noise.draw<F>(span, sample, [&](int i, F e) __attribute__((always_inline)) {
      store<F>(eps + i, e);
      if (weight) store<F>(weight + i, fma_lane(load<F>(sigma.data + i), e, load<F>(mu + i)));
    });
  }

  // The same of noise that was drawn before.
  void take(const Span& span, const S* kept, const DrawSpan<F>& to) const {
    for (int i = 0; i < span.width; i += W) {
      F e = load<F>(kept + i);
      store<F>(to.eps + i, e);
      if (to.weight) store<F>(to.weight + i, fma_lane(load<F>(sigma.data + i), e, load<F>(mu + i)));
    }
  }

  // Of several draws: adds to by_mu = sum_s dW_s and by_sigma = sum_s dW_s eps_s.
  void accumulate(const Span& span, int64_t sample, const DrawSpan<F>& of) {
    if (samples == 1) return;
    for (int i = 0; i < span.width; i += W) {
      F g = by_weight(i, of), g_eps = g * load<F>(of.eps + i);
      store<F>(of.by_mu + i, sample ? load<F>(of.by_mu + i) + g : g);
      store<F>(of.by_sigma + i, sample ? load<F>(of.by_sigma + i) + g_eps : g_eps);
    }
  }

  // Of another estimator, by_mu and by_sigma before what draws add to them.
  void start(const Span& span, const DrawSpan<F>& of) {
    if (without_draws()) return;
    for (int i = 0; i < span.width; i += W) {
      store<F>(of.by_mu + i, of.first ? load<F>(of.first + i) : splat<F>(0));
      store<F>(of.by_sigma + i, of.second ? by_second(i, of) : splat<F>(0));
    }
  }

  // What a draw adds to them: flipout's D_s, and the sampled KL.
  void add_draw(const Span& span, const DrawSpan<F>& of, const S* by_second) {
    F share = splat<F>(S(1) / static_cast<S>(samples));
    for (int i = 0; i < span.width; i += W) {
      F g = by_second ? load<F>(by_second + i) : splat<F>(0);
      if (divergence == kSampled) {
        F by_weight = times(load<F>(factor + i) * share, kl_by_location(load<F>(of.weight + i), prior.at(i)));
        store<F>(of.by_mu + i, load<F>(of.by_mu + i) + by_weight);
        g += by_weight;
      }
      store<F>(of.by_sigma + i, fma_lane(g, load<F>(of.eps + i), load<F>(of.by_sigma + i)));
    }
  }

  // Puts the gradients together and writes them.
  void finish(const Span& span, const DrawSpan<F>& of, void* grad_mu, void* grad_rho) {
    Tile<F> mu_out, rho_out;
    SpanOutput<F> d_mu(grad_mu, p.type, p.columns, span, mu_out), d_rho(grad_rho, p.type, p.columns, span, rho_out);
    auto write = [&](auto by_mu_and_sigma) __attribute__((always_inline)) {
      for (int i = 0; i < span.width; i += W) {
        F m, r;
        by_mu_and_sigma(i, m, r);
        r *= load<F>(d_sigma + i);
        if (divergence == kAnalytic) m += times(load<F>(factor + i), kl_by_location(load<F>(mu + i), prior.at(i)));
        if (divergence != kNone) r += load<F>(kl_rho + i);
        auto pruned = is_pruned(load<F>(rho + i));
        store<F>(d_mu.target + i, select(pruned, splat<F>(0), m));
        store<F>(d_rho.target + i, select(pruned, splat<F>(0), in_full(p.scale, load<F>(sigma + i), r)));
      }
    };
    if (estimator == kWeight && !through_weights(of))
      write([](int, F& m, F& r) { m = r = splat<F>(0); });
    else if (estimator == kWeight && samples == 1)
      write([&](int i, F& m, F& r) __attribute__((always_inline)) {
        m = by_weight(i, of);
        r = m * load<F>(of.eps + i);
      });
    else if (without_draws())
      write([&](int i, F& m, F& r) __attribute__((always_inline)) {
        m = load<F>(of.first + i);
        r = by_second(i, of);
      });
    else
      write([&](int i, F& m, F& r) __attribute__((always_inline)) {
        m = load<F>(of.by_mu + i);
        r = load<F>(of.by_sigma + i);
      });
    d_mu.finish();
    d_rho.finish();
  }

  bool through_weights(const DrawSpan<F>& of) const { return of.grad_weight || divergence == kSampled; }

 private:
  const S* factor;  // the gradient that reaches the KL
  S number = 0;     // where it is one
  Tile<F> mu_scratch, rho_scratch, factor_scratch;

  // "local" draws weights for the sampled KL alone.
  bool without_draws() const { return estimator == kLocal && divergence != kSampled; }

  BNN_FN F by_second(int i, const DrawSpan<F>& of) { return times(load<F>(of.second + i), load<F>(sigma + i)); }

  // dW of a draw, with the sampled KL's gradient by w in it.
  BNN_FN F by_weight(int i, const DrawSpan<F>& of) {
    F g = of.grad_weight ? load<F>(of.grad_weight + i) : splat<F>(0);
    if (divergence != kSampled) return g;
    F share = splat<F>(S(1) / static_cast<S>(samples));
    return g + times(load<F>(factor + i) * share, kl_by_location(load<F>(of.weight + i), prior.at(i)));
  }
};

template <class F> inline void sample_backward(const SampleBackward& problem, int64_t task_begin, int64_t task_end) {
  const Posterior& p = problem.posterior;
  GradientSpan<F> gradient(p, problem.divergence, problem.samples, problem.grad_kl, problem.estimator);
  int64_t stride = p.rows * p.columns * size_of(problem.weight_type);
  Tile<F> scratch, second_scratch, eps, weight, by_mu, by_sigma;
  DrawSpan<F> draw{eps, gradient.divergence == kSampled ? weight.data : nullptr, nullptr, by_mu, by_sigma};
  for (int64_t t = task_begin; t < task_end; ++t)
    for_spans<F>(p, t, [&](const Span& span) {
      if (p.column_factors) {
        const auto* of_weight = !problem.grad_weight ? nullptr : load_span<F>(problem.grad_weight, problem.weight_type, p.columns,
                                                                             span, 0, scratch);
        return factorised_gradients<F>(p, span, of_weight, problem.grad_mu, problem.grad_rho);
      }
      gradient.move_to(span);
      if (problem.estimator != kWeight) {
        bool local = problem.estimator == kLocal;
        auto load = [&](const void* data, int64_t s, ScalarOf<F>* to) {
          return load_span<F>(static_cast<const char*>(data) + s * stride, problem.weight_type, p.columns, span, 0, to);
        };
        draw.first = load(problem.grad_weight, 0, scratch);
        if (local) draw.second = load(problem.grad_second, 0, second_scratch);
        gradient.start(span, draw);
        for (int64_t s = 0; s < problem.samples && (!local || gradient.divergence == kSampled); ++s) {
          gradient.draw(span, s, draw);
          gradient.add_draw(span, draw, local ? nullptr : load(problem.grad_second, s, second_scratch));
        }
        return gradient.finish(span, draw, problem.grad_mu, problem.grad_rho);
      }
      for (int64_t s = 0; s < problem.samples; ++s) {
        if (problem.grad_weight)
          draw.grad_weight = load_span<F>(static_cast<const char*>(problem.grad_weight) + s * stride, problem.weight_type,
                                          p.columns, span, 0, scratch);
        if (!gradient.through_weights(draw)) break;
        if (problem.noise)
          gradient.take(span, load_span<F>(static_cast<const char*>(problem.noise) + s * stride, problem.weight_type, p.columns, span,
                                           0, second_scratch), draw);
        else
          gradient.draw(span, s, draw);
        gradient.accumulate(span, s, draw);
      }
      gradient.finish(span, draw, problem.grad_mu, problem.grad_rho);
    });
}

BNN_FAST_END
