// A span is what the CPU kernels work on at a time: up to kTile columns of one row, or several whole rows where they are
// short, one behind the other. Rows are aligned to whole Philox counters, the span is padded to whole vectors of them.
// Elements outside the tensor are padded so that they contribute nothing: mu = 0, rho = -inf.
#pragma once

#include "pair.h"  // first: the formulas find the lanes' functions only if these are declared before them

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
  int rows = 1;
  int pitch = 0;     // elements from one row to the next
  const int64_t* at = nullptr;  // of rows that are looked up (rows.h), where each is in the tensors; null: from `row` on

  BNN_FN int64_t row_of(int r) const { return at ? at[r] : row + r; }

  // Where the span's elements are, if they follow each other in a tensor [rows, columns].
  template <class S, class Data> BNN_FN S* in_place(Data* data, Type type, int64_t columns) const {
    bool whole = rows == 1 ? first >= 0 && first + width <= columns : !at && pitch == columns && rows * pitch == width;
    return whole && type == type_of<S>() ? static_cast<S*>(data) + row_of(0) * columns + first : nullptr;
  }

  // Calls body(place in the span, place in the tensor, count) for the elements of each row that are in the tensor.
  template <class Body> BNN_FN void for_rows(int64_t columns, Body body) const {
    int low = first < 0 ? static_cast<int>(-first) : 0, end = rows == 1 ? width : pitch;
    int high = first + end > columns ? static_cast<int>(columns - first) : end;
    if (rows > 1 && pitch == columns && !at) return body(0, row * columns, rows * pitch);
    for (int r = 0; r < rows && high > low; ++r) body(r * pitch + low, row_of(r) * columns + first + low, high - low);
  }
};

BNN_FN int64_t column_shift(const Posterior& p) { return p.column_offset & 3; }

// Columns rounded out to counters on the left and to vectors of counters on the right.
template <class F> BNN_FN int64_t padded_columns(const Posterior& p) {
  constexpr int64_t group = 4 * Lane<F>::width;
  return (column_shift(p) + p.columns + group - 1) / group * group;
}

// Columns rounded out to counters on both sides: how far apart short rows are in a span.
BNN_FN int64_t row_pitch(const Posterior& p) { return (column_shift(p) + p.columns + 3) / 4 * 4; }

BNN_FN Span span_at(const Posterior& p, int64_t row, int64_t begin, int64_t end) {
  int64_t width = end - begin < kTile ? end - begin : kTile;
  return {row, begin - column_shift(p), static_cast<int>(width),
          static_cast<uint32_t>((p.column_offset >> 2) + (begin >> 2))};
}

// Short rows from `row` on, as many as fit, before `end`.
template <class F> BNN_FN Span span_of_rows(const Posterior& p, int64_t row, int64_t end) {
  constexpr int group = 4 * Lane<F>::width;
  int pitch = static_cast<int>(row_pitch(p)), rows = kTile / pitch;
  if (row + rows > end) rows = static_cast<int>(end - row);
  Span span = span_at(p, row, 0, (rows * pitch + group - 1) / group * group);
  span.rows = rows;
  span.pitch = pitch;
  return span;
}

// The elements of a span of data [rows, columns]; in place where they are all there in the right type.
template <class F>
inline const ScalarOf<F>* load_span(const void* data, Type type, int64_t columns, const Span& span, ScalarOf<F> pad,
                                    ScalarOf<F>* scratch) {
  if (const auto* values = span.in_place<const ScalarOf<F>>(data, type, columns)) return values;
  for (int i = 0; i < span.width; ++i) scratch[i] = pad;
  span.for_rows(columns, [&](int at, int64_t offset, int count) { convert_from(data, type, offset, count, scratch + at); });
  return scratch;
}

template <class F>
inline void store_span(void* data, Type type, int64_t columns, const Span& span, const ScalarOf<F>* values) {
  span.for_rows(columns, [&](int at, int64_t offset, int count) { convert_to(values + at, count, data, type, offset); });
}

// Where to write a span so that finish() has least to do: the tensor itself, or scratch.
template <class F> struct SpanOutput {
  void* data;
  Type type;
  int64_t columns;
  Span span;
  ScalarOf<F>* target;

  SpanOutput(void* data, Type type, int64_t columns, const Span& span, ScalarOf<F>* scratch)
      : data(data), type(type), columns(columns), span(span), target(span.in_place<ScalarOf<F>>(data, type, columns)) {
    scratched = target == nullptr;
    if (scratched) target = scratch;
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
  template <class G = F> BNN_FN PriorAt<G> at(int i) { return {load<G>(loc + i), load<G>(inverse + i), load<G>(log_scale + i)}; }
};

// Calls f.template operator()<scale>() for the run-time scale, outside the loops over elements.
template <class Function> BNN_FN void with_scale(int scale, Function f) {
  switch (scale) {
    case kSoftplus: f.template operator()<kSoftplus>(); break;
    case kExp: f.template operator()<kExp>(); break;
    case kSqrtExp: f.template operator()<kSqrtExp>(); break;
    case kSquare: f.template operator()<kSquare>(); break;
    default: f.template operator()<kIdentity>();
  }
}

struct SpanNoise {
  Noise<PhiloxRoundKeys> noise;
  uint32_t first_sample;
  int64_t row_offset;

  explicit SpanNoise(const Posterior& p)
      : noise{PhiloxRoundKeys(key_of(p)), p.stream},
        first_sample(p.key ? static_cast<uint32_t>(p.key[1]) : 0),
        row_offset(p.row_offset) {}

  // A divergence alone draws nothing and has none.
  static PhiloxKey key_of(const Posterior& p) {
    auto seed = static_cast<uint64_t>(p.key ? p.key[0] : 0);
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  }

  // The normals of a span, eight vectors at a time, in the order of its elements: use(element, normal).
  template <class F, class Use> BNN_FN void draw(const Span& span, int64_t sample, Use use) const {
    constexpr int W = Lane<F>::width;
    using UInt = typename Lane<F>::UInt;
    const bool looked_up = span.rows > 1 && span.at;
    auto row = static_cast<uint32_t>(row_offset + (looked_up ? 0 : span.row_of(0)));
    auto of_sample = first_sample + static_cast<uint32_t>(sample);
    auto all = [&]<bool many_rows>() __attribute__((always_inline)) {
      uint32_t in_row = many_rows ? static_cast<uint32_t>(span.pitch / 4) : 1;
      uint32_t reciprocal = (1u << 16) / in_row + 1;  // exact, as a span has at most kTile / 4 counters
      int i = 0;
      auto step = [&]<int N>() __attribute__((always_inline)) {
        UInt rows[N], columns[N];
        F normal[N][4];
        for (int n = 0; n < N; ++n) {
          columns[n] = counter_iota<F>() + static_cast<uint32_t>(i / 4 + n * W);
          rows[n] = UInt{};
          if (many_rows) {
            rows[n] = columns[n] * reciprocal >> 16;
            columns[n] -= rows[n] * in_row;
            if (looked_up) rows[n] = look_up<UInt>(rows[n], span);
          }
          rows[n] += row;
          columns[n] += span.counter;
        }
        draw_normals<F, N>(noise, of_sample, rows, columns, normal);
        for (int k = 0; k < 4 * N; ++k) use(i + k * W, normal[k / 4][k % 4]);
        i += 4 * N * W;
      };
      while (i + 8 * W <= span.width) step.template operator()<2>();
      if (i < span.width) step.template operator()<1>();
    };
    if (span.rows == 1)
      all.template operator()<false>();
    else
      all.template operator()<true>();
  }

 private:
  // The rows of these places in a span; of its padding some row of it.
  template <class UInt> BNN_FN static UInt look_up(UInt places, const Span& span) {
    uint32_t lanes[sizeof(UInt) / 4];
    memcpy(lanes, &places, sizeof lanes);
    for (uint32_t& lane : lanes) lane = static_cast<uint32_t>(span.at[lane < static_cast<uint32_t>(span.rows) ? lane : 0]);
    memcpy(&places, lanes, sizeof lanes);
    return places;
  }
};

BNN_FAST_END
