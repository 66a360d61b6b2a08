// Signs of flipout: bits of a Philox counter's words, the lowest first, 128 columns to a counter (column / 128, example, sample,
// stream); a set bit is -1.
#pragma once

#include <algorithm>

#include "../philox.h"
#include "launch.h"

namespace bnn_fast {

// body(begin, end) for parts of [0, count), on torch's threads.
template <class Body> void for_each(int64_t count, int64_t grain, Body body) {
  if (count <= grain) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

// Of activations [samples, examples, columns], whose examples are numbered from first_row on.
struct Signs {
  const int64_t* key;
  int64_t samples, examples, first_row;

  // to = from with signs; from null stands for ones, and it may be the same memory.
  template <class T> void copy(const T* from, T* to, int64_t columns, uint32_t stream) const {
    auto seed = static_cast<uint64_t>(key[0]);
    PhiloxRoundKeys keys({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    for_each(samples * examples, 1 + (1 << 15) / (columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t c = 0; c < columns; c += 128) {
          uint32_t words[1][4] = {{static_cast<uint32_t>(c / 128), static_cast<uint32_t>(first_row + row % examples),
                                   static_cast<uint32_t>(key[1] + row / examples), stream}};
          philox(words, keys);
          int64_t stop = std::min(columns, c + 128);
          for (int64_t i = c; i < stop; ++i) {
            T value = from ? from[row * columns + i] : T(1);
            to[row * columns + i] = words[0][(i - c) / 32] >> ((i - c) % 32) & 1 ? -value : value;
          }
        }
    });
  }
};

}  // namespace bnn_fast
