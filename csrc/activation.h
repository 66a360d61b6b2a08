// Elementwise activations y(z) and their derivatives, as torch.nn has them, with up to two numbers:
//
//   relu        max(z, 0)                               leaky_relu  z > 0 ? z : a z
//   elu         z > 0 ? z : a (e^z - 1)                 softplus    log(1 + e^(a z)) / a, z where a z > b
//   sigmoid     1 / (1 + e^-z)                          tanh
//   silu        z sigmoid(z)                            gelu        z Phi(z)
//   gelu_tanh   z (1 + tanh(c (z + 0.044715 z^3))) / 2, c = sqrt(2 / pi)
//
// (gelu: Hendrycks and Gimpel, "Gaussian error linear units", 2016; silu: Elfwing et al., "Sigmoid-weighted linear units",
// 2018.) One exponential serves value and derivative; its argument is never positive, so that nothing overflows. A NaN stays one.
#pragma once

#include "elementary.h"

BNN_FAST_BEGIN

enum Activation : int {
  kNoActivation, kRelu, kLeakyRelu, kElu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kSoftplusActivation, kActivations
};

template <class F> struct Activated {
  F value, slope;
};

// e^x - 1 for x <= 0, right in the relative sense.
template <class F> BNN_FN F expm1_minus(F x) {
  return select(x > -0.34f, expm1_reduced(x), exp_minus(-x) - 1.0f);
}
BNN_FN double expm1_minus(double x) { return expm1(x); }

template <class F> BNN_FN F tanh_lane(F x) {
  F e = expm1_minus(-2.0f * abs_lane(x));
  F positive = quotient(-e, e + 2.0f);
  return select(x < 0.0f, -positive, positive);
}
BNN_FN double tanh_lane(double x) { return tanh(x); }

// erfc(x) for x >= 0 with e^(-x^2) at hand: a minimax fit in t = 1 / (1 + 0.33 x), to 1e-7 of it.
template <class F> BNN_FN F erfc_lane(F x, F gaussian) {
  F t = quotient(splat<F>(1), fma_lane(x, splat<F>(0.33f), splat<F>(1)));
  F p = splat<F>(-0.135347202f);
  p = fma_lane(p, t, splat<F>(0.460243762f));
  p = fma_lane(p, t, splat<F>(-0.351161838f));
  p = fma_lane(p, t, splat<F>(0.408511907f));
  p = fma_lane(p, t, splat<F>(0.0472138636f));
  p = fma_lane(p, t, splat<F>(0.201226115f));
  p = fma_lane(p, t, splat<F>(0.182955548f));
  p = fma_lane(p, t, splat<F>(0.186357826f));
  return p * t * gaussian;
}
BNN_FN double erfc_lane(double x, double) { return erfc(x); }

// sigmoid(z) as {value, 1 - value}, each right in the relative sense.
template <class F> struct Sigmoid {
  F value, rest;
};
template <class F> BNN_FN Sigmoid<F> sigmoid_lane(F z) {
  F t = exp_minus(abs_lane(z)), large = quotient(splat<F>(1), t + typename Lane<F>::Scalar(1)), small = t * large;
  auto negative = z < typename Lane<F>::Scalar(0);
  return {select(negative, small, large), select(negative, large, small)};
}

template <int kind, class F> BNN_FN Activated<F> activate(F z, typename Lane<F>::Scalar a, typename Lane<F>::Scalar b) {
  using Scalar = typename Lane<F>::Scalar;
  F zero = splat<F>(0), one = splat<F>(1);
  if constexpr (kind == kRelu) {
    auto off = z <= Scalar(0);
    return {select(off, zero, z), select(off, zero, one)};
  } else if constexpr (kind == kLeakyRelu) {
    auto on = z > Scalar(0);
    return {select(on, z, z * a), select(on, one, splat<F>(a))};
  } else if constexpr (kind == kElu) {
    auto on = z > Scalar(0);
    F e = expm1_minus(select(on, zero, z)) * a;
    return {select(on, z, e), select(on, one, e + a)};
  } else if constexpr (kind == kSoftplusActivation) {
    F u = z * a;
    auto linear = u > b;
    F t = exp_minus(abs_lane(u)), value = quotient(select(u > Scalar(0), u, zero) + log1p_lane(t), splat<F>(a));
    return {select(linear, z, value), select(linear, one, sigmoid_lane(u).value)};
  } else if constexpr (kind == kTanh) {
    F y = tanh_lane(z);
    return {y, fma_lane(-y, y, one)};
  } else if constexpr (kind == kSigmoid) {
    Sigmoid<F> s = sigmoid_lane(z);
    return {s.value, s.value * s.rest};
  } else if constexpr (kind == kSilu) {
    Sigmoid<F> s = sigmoid_lane(z);
    return {z * s.value, s.value * fma_lane(z, s.rest, one)};
  } else if constexpr (kind == kGelu) {
    F x = abs_lane(z) * Scalar(0.70710678118654752), gaussian = exp_minus(x * x), tail = erfc_lane(x, gaussian) * Scalar(0.5);
    F phi = select(z < Scalar(0), tail, Scalar(1) - tail);
    return {z * phi, fma_lane(z, gaussian * Scalar(0.39894228040143268), phi)};
  } else if constexpr (kind == kGeluTanh) {
    constexpr Scalar c = Scalar(0.79788456080286536), cubic = Scalar(0.044715);
    F square = z * z, t = tanh_lane(z * fma_lane(square, splat<F>(c * cubic), splat<F>(c)));
    F half = (t + Scalar(1)) * Scalar(0.5), by_z = fma_lane(square, splat<F>(3 * c * cubic), splat<F>(c));
    return {z * half, times(fma_lane(-t, t, one) * Scalar(0.5), z * by_z) + half};
  } else {
    return {z, one};
  }
}

// Calls f.template operator()<kind>() for the run-time kind.
template <class Function> BNN_FN void with_activation(int kind, Function f) {
  switch (kind) {
    case kRelu: f.template operator()<kRelu>(); break;
    case kLeakyRelu: f.template operator()<kLeakyRelu>(); break;
    case kElu: f.template operator()<kElu>(); break;
    case kGelu: f.template operator()<kGelu>(); break;
    case kGeluTanh: f.template operator()<kGeluTanh>(); break;
    case kSilu: f.template operator()<kSilu>(); break;
    case kTanh: f.template operator()<kTanh>(); break;
    case kSigmoid: f.template operator()<kSigmoid>(); break;
    case kSoftplusActivation: f.template operator()<kSoftplusActivation>(); break;
    default: f.template operator()<kNoActivation>();
  }
}

BNN_FAST_END
