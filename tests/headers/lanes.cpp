// Compiled once for every lane type, with -DTABLE=name -DLANE=type and the instruction set's flags.
#include "../../csrc/cpu/lanes.h"

#include "../../csrc/divergence.h"
#include "../../csrc/normal.h"

#include "table.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

using namespace bnn_fast;

namespace {

using F = LANE;
using Scalar = Lane<F>::Scalar;
using UInt = Lane<F>::UInt;
using Word = Lane<F>::Word;
constexpr size_t width = Lane<F>::width;

// The i-th group of `width` elements; beyond the end the first one is repeated.
template <class V, class T> V take(const T* x, size_t i, size_t n) {
  T group[width];
  for (size_t l = 0; l < width; ++l) group[l] = x[i + l < n ? i + l : 0];
  V v;
  static_assert(sizeof v == sizeof group);
  std::memcpy(&v, group, sizeof v);
  return v;
}

template <class V, class T> void put(T* y, V v, size_t i, size_t n) {
  T group[width];
  static_assert(sizeof v == sizeof group);
  std::memcpy(group, &v, sizeof v);
  for (size_t l = 0; l < width && i + l < n; ++l) y[i + l] = group[l];
}

template <class In, class T, class Function> void map(const void* x, void* y, size_t n, Function function) {
  for (size_t i = 0; i < n; i += width) {
    put(static_cast<Scalar*>(y), function(take<In>(static_cast<const T*>(x), i, n)), i, n);
  }
}

void elementary(const char* name, const void* x, void* y, size_t n) {
  std::string function = name;
  if (function == "exp") return map<F, Scalar>(x, y, n, [](F v) { return exp_lane(v); });
  if (function == "log") return map<F, Scalar>(x, y, n, [](F v) { return log_lane(v); });
  if (function == "log1p") return map<F, Scalar>(x, y, n, [](F v) { return log1p_lane(v); });
  throw std::invalid_argument("no function " + function);
}

void on_word(const char* name, const uint32_t* x, void* y, size_t n) {
  std::string function = name;
  if (function == "radius") return map<UInt, uint32_t>(x, y, n, [](UInt v) { return radius<F>(v); });
  bool wants_sine = function == "sine";
  if (!wants_sine && function != "cosine") throw std::invalid_argument("no function " + function);
  map<UInt, uint32_t>(x, y, n, [=](UInt v) {
    F sine, cosine;
    circle<F>(v, sine, cosine);
    return wants_sine ? sine : cosine;
  });
}

void philox_words(const uint32_t* counters, uint32_t k0, uint32_t k1, uint32_t* words, size_t n) {
  for (size_t i = 0; i < n; i += width) {
    Word x[1][4];
    for (int w = 0; w < 4; ++w) x[0][w] = to_word(take<UInt>(counters + w * n, i, n));
    philox(x, PhiloxKey{k0, k1});
    for (int w = 0; w < 4; ++w) put<UInt>(words + w * n, from_word(x[0][w]), i, n);
  }
}

void normals_of_words(const uint32_t* words, void* normals, size_t n) {
  for (size_t i = 0; i < n; i += width) {
    UInt x[4];
    for (int w = 0; w < 4; ++w) x[w] = take<UInt>(words + w * n, i, n);
    F normal[4];
    normal4<F>(x[0], x[1], x[2], x[3], normal);
    for (int w = 0; w < 4; ++w) put(static_cast<Scalar*>(normals) + w * n, normal[w], i, n);
  }
}

void draw(uint64_t seed, uint32_t stream, uint32_t sample, uint32_t row, void* normals, size_t n) {
  Noise<PhiloxKey> noise{{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, stream};
  for (size_t i = 0; i < n; i += 4 * width) {
    const UInt rows[] = {UInt{} + row}, columns[] = {counter_iota<F>() + static_cast<uint32_t>(i / 4)};
    F normal[1][4];
    draw_normals<F>(noise, sample, rows, columns, normal);
    for (size_t w = 0; w < 4; ++w) put(static_cast<Scalar*>(normals), normal[0][w], i + w * width, n);
  }
}

Spread<F> spread_of(int scale, F rho) {
  switch (scale) {
    case kSoftplus: return spread<kSoftplus>(rho);
    case kExp: return spread<kExp>(rho);
    case kSqrtExp: return spread<kSqrtExp>(rho);
    case kSquare: return spread<kSquare>(rho);
    default: return spread<kIdentity>(rho);
  }
}

void spread_all(int scale, const void* rho, void* four, size_t n) {
  for (size_t i = 0; i < n; i += width) {
    Spread<F> s = spread_of(scale, take<F>(static_cast<const Scalar*>(rho), i, n));
    F values[] = {s.sigma, s.log_sigma, in_full(scale, s.sigma, s.d_sigma), s.d_log_sigma};
    for (size_t k = 0; k < 4; ++k) put(static_cast<Scalar*>(four) + k * n, values[k], i, n);
  }
}

void divergence(int scale, const void* mu, const void* rho, const void* eps, double loc, double prior_scale,
                void* four, size_t n) {
  PriorAt<F> prior{splat<F>(static_cast<Scalar>(loc)), splat<F>(static_cast<Scalar>(1 / prior_scale)),
                   splat<F>(static_cast<Scalar>(std::log(prior_scale)))};
  for (size_t i = 0; i < n; i += width) {
    F m = take<F>(static_cast<const Scalar*>(mu), i, n), e = take<F>(static_cast<const Scalar*>(eps), i, n);
    Spread<F> s = spread_of(scale, take<F>(static_cast<const Scalar*>(rho), i, n));
    F values[] = {kl_analytic(m, s, prior), kl_sampled(fma_lane(s.sigma, e, m), e, s.log_sigma, prior),
                  kl_by_location(m, prior), in_full(scale, s.sigma, kl_by_rho(s, prior))};
    for (size_t k = 0; k < 4; ++k) put(static_cast<Scalar*>(four) + k * n, values[k], i, n);
  }
}

}  // namespace

#define STRING(x) #x
#define NAME(x) STRING(x)
extern const Table TABLE{NAME(TABLE), Lane<F>::width, sizeof(Scalar), elementary, on_word,
                         philox_words, normals_of_words, draw, spread_all, divergence};
