// The lists that the operators take (ops.cpp), unpacked and checked here alone: what is given becomes posteriors and options.
#pragma once

#include <bit>

#include "divergence.h"
#include "tensors.h"

namespace bnn_fast {

using Numbers = std::vector<double>;
using Integers = std::vector<int64_t>;

constexpr int64_t kCounterWord = int64_t(1) << 32;  // values of one word of the noise counter

// Elements, drawn weights of a chain or the noise of rows that are looked up, that a forward keeps for its backward: 4 MiB of float32.
// KEPT in bnn_fast/operators/arguments.py.
constexpr int64_t kKept = int64_t(1) << 20;

// Each number's meaning is in posterior.h and divergence.h; places: see ops.cpp.
struct Options {
  int64_t scale, places, divergence = kAnalytic, samples = 1, stream = 0, row_offset = 0, column_offset = 0;
  int64_t estimator = kWeight;
};

// A posterior with the contiguous tensors that its pointers look into.
struct PosteriorTensors {
  Tensor mu, rho;
  OptionalTensor loc, scale, key;
  Posterior view;
};

// estimated: whether the estimator is among them.
inline Options options_of(const Integers& given, bool estimated = false) {
  STD_TORCH_CHECK(given.size() == (estimated ? 8 : 7), "options has ", given.size(), " numbers, expected ", estimated ? 8 : 7,
                  ": scale, prior's places, kl, n_samples, stream, row_offset, column_offset", estimated ? ", estimator" : "");
  Options o{given[0], given[1], given[2], given[3], given[4], given[5], given[6]};
  STD_TORCH_CHECK(o.divergence >= 0 && o.divergence <= 2, "kl is ", o.divergence,
                  ", expected 0 (none), 1 (analytic) or 2 (sampled)");
  STD_TORCH_CHECK(o.samples >= 1 && o.samples <= kCounterWord, "n_samples is ", o.samples, ", expected 1 to 2^32");
  if (!estimated) return o;
  o.estimator = given[7];
  STD_TORCH_CHECK(o.estimator == kLocal || o.estimator == kFlipout, "estimator is ", o.estimator,
                  ", expected 1 (local) or 2 (flipout)");
  STD_TORCH_CHECK(o.stream == 0 && o.row_offset == 0 && o.column_offset == 0, "stream, row_offset and column_offset are ", o.stream,
                  ", ", o.row_offset, " and ", o.column_offset, ", expected 0 with this estimator");
  return o;
}

// Of the KL without a draw: reduce is whether the sum is wanted.
struct KlOptions {
  int64_t scale, places, reduce;
};

inline KlOptions kl_options_of(const Integers& given) {
  STD_TORCH_CHECK(given.size() == 3, "options has ", given.size(), " numbers, expected 3: scale, prior's places, reduce");
  STD_TORCH_CHECK(given[2] == 0 || given[2] == 1, "reduce is ", given[2], ", expected 0 or 1");
  return {given[0], given[1], given[2]};
}

struct Lists {
  const Tensors &posterior, &prior;
  const Numbers& numbers;

  Lists(const Tensors& posterior, const Tensors& prior, const Numbers& numbers, bool layer)
      : posterior(posterior), prior(prior), numbers(numbers) {
    size_t n = posterior.size();
    STD_TORCH_CHECK(n == 2 || (layer && n == 4), "posterior has ", n, " tensors, expected ",
                    layer ? "weight_mu and weight_rho, and then both or none of bias_mu and bias_rho" : "mu and rho");
    STD_TORCH_CHECK(numbers.size() == n, "numbers has ", numbers.size(), ", expected ", n,
                    ": a loc and a scale for each mu and rho");
    // Some versions of torch move the tensors out of a list that they hand over: a constant of a graph has none the next time.
  }

  bool has(size_t pair) const { return 2 * pair < posterior.size(); }

  // The prior's tensor in this place, if it has one there.
  OptionalTensor prior_at(size_t place, int64_t places) const {
    int64_t all = (int64_t(1) << posterior.size()) - 1;
    STD_TORCH_CHECK((places & ~all) == 0 && std::popcount(static_cast<uint64_t>(places)) == static_cast<int>(prior.size()),
                    "prior's places are ", places, ", expected a bit below 2^", posterior.size(), " for each of its ",
                    prior.size(), " tensors");
    if (!(places >> place & 1)) return {};
    return prior[std::popcount(static_cast<uint64_t>(places & ((int64_t(1) << place) - 1)))];
  }

  // A tensor of any shape counts as [first dimension, everything else]; a vector as one row, like a bias.
  PosteriorTensors pair(size_t pair, const OptionalTensor& key, const Options& options) const {
    const Tensor &mu = posterior[2 * pair], &rho = posterior[2 * pair + 1];
    OptionalTensor loc = prior_at(2 * pair, options.places), scale = prior_at(2 * pair + 1, options.places);
    check_like(rho, "rho", mu, "mu");
    if (loc) check_like(*loc, "the prior's loc", mu, "mu");
    if (scale) check_like(*scale, "the prior's scale", mu, "mu");
    STD_TORCH_CHECK(options.scale >= 0 && options.scale < kScales, "scale is ", options.scale,
                    ", expected 0 (softplus), 1 (exp), 2 (sqrt_exp), 3 (square) or 4 (identity)");
    STD_TORCH_CHECK(options.row_offset >= 0 && options.column_offset >= 0, "row_offset and column_offset are ",
                    options.row_offset, " and ", options.column_offset, ", expected no negative number");
    STD_TORCH_CHECK(options.stream >= 0 && options.stream < kCounterWord, "stream is ", options.stream,
                    ", expected 0 to 2^32 - 1");
    check_storage(mu, "mu");
    check_storage(rho, "rho");
    check_storage(loc, "the prior's loc");
    check_storage(scale, "the prior's scale");
    int64_t rows = mu.dim() > 1 ? mu.size(0) : 1;
    int64_t columns = 1;
    for (int64_t d = mu.dim() > 1 ? 1 : 0; d < mu.dim(); ++d) columns *= mu.size(d);
    STD_TORCH_CHECK(rows <= kCounterWord && options.row_offset <= kCounterWord - rows && columns <= 4 * kCounterWord &&
                        options.column_offset <= 4 * kCounterWord - columns,
                    "mu with its offsets has more rows or columns than the noise counter: 2^32 and 2^34");
    if (key) {
      STD_TORCH_CHECK(key->scalar_type() == ScalarType::Long && key->dim() == 1 && (key->size(0) == 2 || key->size(0) == 3),
                      "key has shape ", describe(shape_of(*key)),
                      ", expected an int64 tensor of shape [2]: (seed, first_sample), or [3] with the first row of x behind");
      STD_TORCH_CHECK(on_device_of(*key, mu), "key and mu are on different devices");
      check_storage(*key, "key");
    }
    PosteriorTensors p{dense(mu), dense(rho), dense(loc), dense(scale), dense(key), {}};
    p.view = Posterior{rows,
                       columns,
                       type_of_tensor(mu, "mu"),
                       p.mu.const_data_ptr(),
                       p.rho.const_data_ptr(),
                       static_cast<int>(options.scale),
                       {numbers[2 * pair], numbers[2 * pair + 1], data_of(p.loc), data_of(p.scale)},
                       static_cast<const int64_t*>(data_of(p.key)),
                       static_cast<uint32_t>(options.stream),
                       options.row_offset,
                       options.column_offset};
    return p;
  }
};

}  // namespace bnn_fast
