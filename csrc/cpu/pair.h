// Two of a vector as one lane type. A formula is a chain of operations that wait for each other, longer than a processor looks
// ahead; over pairs of pairs four chains run side by side, with the same bits.
#pragma once

#include "lanes.h"

BNN_FAST_BEGIN

template <class V> struct Pair {
  V low, high;
  template <class F> BNN_FN explicit operator Pair<F>() const { return {to_floating<F>(low), to_floating<F>(high)}; }
};

template <class V> struct Lane<Pair<V>> {
  using Scalar = typename Lane<V>::Scalar;
  using Int = Pair<typename Lane<V>::Int>;
  static constexpr int width = 2 * Lane<V>::width;
};

// As many vectors as there are registers to compute on at once; a divisor of four.
template <class F> struct GroupOf { using Type = F; };
#if BNN_FAST_VECTOR_BITS >= 512
template <> struct GroupOf<f32x16> { using Type = Pair<Pair<f32x16>>; };
#endif
template <class F> using Group = typename GroupOf<F>::Type;

// Calls body(vector) for the vectors of a group, in the order of their elements.
template <class F, class Body> BNN_FN void for_parts(F x, Body body) { body(x); }
template <class F, class V, class Body> BNN_FN void for_parts(Pair<V> x, Body body) {
  for_parts<F>(x.low, body);
  for_parts<F>(x.high, body);
}

template <class S> concept IsNumber = !requires(S s) { s[0]; } && !requires(S s) { s.low; };

#define BNN_PAIR_OPERATOR(op)                                                                                       \
  template <class V> BNN_FN auto operator op(Pair<V> a, Pair<V> b) {                                                \
    return Pair<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high};                                        \
  }                                                                                                                 \
  template <class V, IsNumber S> BNN_FN auto operator op(Pair<V> a, S b) {                                          \
    return Pair<decltype(a.low op b)>{a.low op b, a.high op b};                                                     \
  }                                                                                                                 \
  template <class V, IsNumber S> BNN_FN auto operator op(S a, Pair<V> b) {                                          \
    return Pair<decltype(a op b.low)>{a op b.low, a op b.high};                                                     \
  }
BNN_PAIR_OPERATOR(+)
BNN_PAIR_OPERATOR(-)
BNN_PAIR_OPERATOR(*)
BNN_PAIR_OPERATOR(<)
BNN_PAIR_OPERATOR(>)
BNN_PAIR_OPERATOR(==)
BNN_PAIR_OPERATOR(&)
BNN_PAIR_OPERATOR(<<)
BNN_PAIR_OPERATOR(>>)
#undef BNN_PAIR_OPERATOR

template <class V> BNN_FN Pair<V> operator-(Pair<V> a) { return {-a.low, -a.high}; }

template <class V> BNN_FN Pair<V> fma_lane(Pair<V> a, Pair<V> b, Pair<V> c) {
  return {fma_lane(a.low, b.low, c.low), fma_lane(a.high, b.high, c.high)};
}
template <class V> BNN_FN Pair<V> quotient(Pair<V> a, Pair<V> b) { return {quotient(a.low, b.low), quotient(a.high, b.high)}; }
template <class V> BNN_FN Pair<V> abs_lane(Pair<V> a) { return {abs_lane(a.low), abs_lane(a.high)}; }
template <class M, class V> BNN_FN Pair<V> select(Pair<M> mask, Pair<V> a, Pair<V> b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}
template <class To, class V> BNN_FN To bit_cast(Pair<V> x) {
  return {bit_cast<decltype(To::low)>(x.low), bit_cast<decltype(To::high)>(x.high)};
}

BNN_FAST_END
