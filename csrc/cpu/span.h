// A span is what the CPU kernels work on at a time: up to kTile columns of one row, aligned to whole Philox counters and
// padded to whole vectors. Elements outside the tensor are padded so that they contribute nothing: mu = 0, rho = -inf.
#pragma once

#include "lanes.h"  // first: the formulas find the lanes' functions only if these are declared before them

#include "../divergence.h"
#include "../normal.h"
#include "../problem.h"
#include "convert.h"

BNN_FAST_BEGIN

constexpr int kTile = 256;

template <class F> using ScalarOf = typename Lane<F>::Scalar;

// One row of a tile, on the stack.
template <class F> struct Tile {
  alignas(64) ScalarOf<F> data[kTile];
  BNN_FN operator ScalarOf<F>*() { return data; }
};

struct Span {
  int64_t row;
  int64_t first;     // column of the first element; from -3, where the offset is not a multiple of 4
  int width;         // padded to whole vectors of counters
  uint32_t counter;  // of the first element
};

BNN_FN int64_t column_shift(const Posterior& p) { return p.column_offset & 3; }

// Columns rounded out to counters on the left and to vectors of counters on the right.
template <class F> BNN_FN int64_t padded_columns(const Posterior& p) {
  constexpr int64_t group = 4 * Lane<F>::width;
  return (column_shift(p) + p.columns + group - 1) / group * group;
}

BNN_FN Span span_at(const Posterior& p, int64_t row, int64_t begin, int64_t end) {
  int64_t width = end - begin < kTile ? end - begin : kTile;
  return {row, begin - column_shift(p), static_cast<int>(width),
          static_cast<uint32_t>((p.column_offset >> 2) + (begin >> 2))};
}

// The elements of a span of data [rows, columns]; in place where they are all there in the right type.
template <class F>
inline const ScalarOf<F>* load_span(const void* data, Type type, int64_t columns, const Span& span, ScalarOf<F> pad,
                                    ScalarOf<F>* scratch) {
  int64_t offset = span.row * columns + span.first;
  if (span.first >= 0 && span.first + span.width <= columns && type == type_of<ScalarOf<F>>())
    return static_cast<const ScalarOf<F>*>(data) + offset;
  int low = span.first < 0 ? static_cast<int>(-span.first) : 0;
  int high = span.first + span.width > columns ? static_cast<int>(columns - span.first) : span.width;
  for (int i = 0; i < low; ++i) scratch[i] = pad;
  if (high > low) convert_from(data, type, offset + low, high - low, scratch + low);
  for (int i = high > low ? high : low; i < span.width; ++i) scratch[i] = pad;
  return scratch;
}

template <class F>
inline void store_span(void* data, Type type, int64_t columns, const Span& span, const ScalarOf<F>* values) {
  int low = span.first < 0 ? static_cast<int>(-span.first) : 0;
  int high = span.first + span.width > columns ? static_cast<int>(columns - span.first) : span.width;
  if (high > low) convert_to(values + low, high - low, data, type, span.row * columns + span.first + low);
}

// Where to write a span so that finish() has least to do: the tensor itself, or scratch.
template <class F> struct SpanOutput {
  void* data;
  Type type;
  int64_t columns;
  Span span;
  ScalarOf<F>* target;

  SpanOutput(void* data, Type type, int64_t columns, const Span& span, ScalarOf<F>* scratch)
      : data(data), type(type), columns(columns), span(span), target(scratch) {
    if (span.first >= 0 && span.first + span.width <= columns && type == type_of<ScalarOf<F>>())
      target = static_cast<ScalarOf<F>*>(data) + span.row * columns + span.first;
    scratched = target == scratch;
  }
  void finish() const {
    if (scratched) store_span<F>(data, type, columns, span, target);
  }

 private:
  bool scratched;
};

// The prior over a span. Numbers are spread out once, tensors loaded for every span.
template <class F> struct PriorSpan {
  Tile<F> loc, inverse, log_scale;

  explicit PriorSpan(const Prior& prior) {
    auto log_of_scale = static_cast<ScalarOf<F>>(log(prior.scale));  // no compiler takes it out of the loop
    for (int i = 0; i < kTile; ++i) {
      loc[i] = static_cast<ScalarOf<F>>(prior.loc);
      inverse[i] = static_cast<ScalarOf<F>>(1.0 / prior.scale);
      log_scale[i] = log_of_scale;
    }
  }
  void move_to(const Posterior& p, const Span& span) {
    Tile<F> scratch;
    if (p.prior.loc_tensor) {
      const auto* values = load_span<F>(p.prior.loc_tensor, p.type, p.columns, span, 0, scratch);
      for (int i = 0; i < span.width; ++i) loc[i] = values[i];
    }
    if (p.prior.scale_tensor) {
      const auto* values = load_span<F>(p.prior.scale_tensor, p.type, p.columns, span, 1, scratch);
      for (int i = 0; i < span.width; ++i) {
        inverse[i] = 1 / values[i];
        log_scale[i] = log_lane(values[i]);
      }
    }
  }
  BNN_FN PriorAt<F> at(int i) { return {load<F>(loc + i), load<F>(inverse + i), load<F>(log_scale + i)}; }
};

// Calls f.template operator()<scale>() for the run-time scale, outside the loops over elements.
template <class Function> BNN_FN void with_scale(int scale, Function f) {
  switch (scale) {
    case kSoftplus: f.template operator()<kSoftplus>(); break;
    case kExp: f.template operator()<kExp>(); break;
    default: f.template operator()<kSqrtExp>();
  }
}

struct SpanNoise {
  Noise noise;
  uint32_t first_sample;
  int64_t row_offset;

  explicit SpanNoise(const Posterior& p) : noise{0, 0, p.stream}, first_sample(0), row_offset(p.row_offset) {
    if (!p.key) return;  // a divergence alone draws nothing
    noise.seed_low = static_cast<uint32_t>(p.key[0]);
    noise.seed_high = static_cast<uint32_t>(static_cast<uint64_t>(p.key[0]) >> 32);
    first_sample = static_cast<uint32_t>(p.key[1]);
  }

  // The normals of a span, four vectors at a time, in column order: use(column, normal).
  template <class F, class Use> BNN_FN void draw(const Span& span, int64_t sample, Use use) const {
    constexpr int W = Lane<F>::width;
    for (int i = 0; i < span.width; i += 4 * W) {
      F normal[4];
      draw_normals<F>(noise, first_sample + static_cast<uint32_t>(sample), static_cast<uint32_t>(row_offset + span.row),
                      span.counter + i / 4, normal);
      for (int k = 0; k < 4; ++k) use(i + k * W, normal[k]);
    }
  }
};

BNN_FAST_END
