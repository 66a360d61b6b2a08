// Signs of flipout: bits of a Philox counter's words, the lowest first, 128 columns to a counter (column / 128, example, sample,
// stream); a set bit is -1.
#pragma once

#include <array>
#include <cstring>
#include <type_traits>

#include "../philox.h"
#include "activations.h"

namespace bnn_fast {

// Of activations [samples, examples, columns], whose examples are numbered from first_row on.
struct Signs {
  const int64_t* key;
  int64_t samples, examples, first_row;

  // to = from with signs; from null stands for ones, and it may be the same memory.
  template <class T> void copy(const T* from, T* to, int64_t columns, uint32_t stream) const {
    constexpr int kRows = 4;  // whose counters are taken at once: the rounds of one fill the waits of another
    auto seed = static_cast<uint64_t>(key[0]);
    PhiloxRoundKeys keys({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    int64_t rows = samples * examples;
    for_rows((rows + kRows - 1) / kRows, kRows * columns, [&](int64_t group) {
      int64_t first = group * kRows, count = std::min<int64_t>(kRows, rows - first);
      for (int64_t c = 0; c < columns; c += 128) {
        uint32_t words[kRows][4];
        for (int n = 0; n < kRows; ++n) {
          int64_t row = first + n;
          words[n][0] = static_cast<uint32_t>(c / 128);
          words[n][1] = static_cast<uint32_t>(first_row + row % examples);
          words[n][2] = static_cast<uint32_t>(key[1] + row / examples);
          words[n][3] = stream;
        }
        philox(words, keys);
        for (int64_t n = 0; n < count; ++n) {
          int64_t at = (first + n) * columns + c;
          with_signs(from ? from + at : nullptr, to + at, std::min<int64_t>(128, columns - c), words[n]);
        }
      }
    });
  }

 private:
  // Four elements at a time, by masks that four bits choose.
  template <class T> static void with_signs(const T* from, T* to, int64_t count, const uint32_t (&words)[4]) {
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    static constexpr auto masks = [] {
      std::array<std::array<Bits, 4>, 16> all{};
      for (unsigned four = 0; four < 16; ++four)
        for (unsigned k = 0; k < 4; ++k) all[four][k] = Bits(four >> k & 1) << (8 * sizeof(T) - 1);
      return all;
    }();
    const T ones[4] = {1, 1, 1, 1};
    for (int64_t i = 0; i < count; i += 4) {
      auto& mask = masks[words[i / 32] >> (i % 32) & 15];
      int64_t some = std::min<int64_t>(4, count - i);
      Bits bits[4] = {};
      memcpy(bits, from ? from + i : ones, some == 4 ? sizeof bits : some * sizeof(T));
      for (int k = 0; k < 4; ++k) bits[k] ^= mask[k];
      memcpy(to + i, bits, some == 4 ? sizeof bits : some * sizeof(T));
    }
  }
};

}  // namespace bnn_fast
