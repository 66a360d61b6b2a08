// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3).
//
// A block cipher used as a counter-based generator: four 32-bit counter words and a 64-bit key give four random words,
// with no state. The noise of a weight is a function of (seed, sample, row, column) alone, so it can be drawn
// again in the backward pass, on any device, in any order, instead of being stored.
//
//   key     (low 32 bits of the seed, high 32 bits)
//   counter (column / 4, row, sample, stream)
//   words   x0..x3, from which normal.h makes the four normals of columns 4c to 4c+3
#pragma once

#include "lane.h"

BNN_FAST_BEGIN

// The keys of the ten rounds, made from the first.
struct PhiloxKey {
  uint32_t k0, k1;
  BNN_FN uint32_t first(int round) const { return k0 + static_cast<uint32_t>(round) * 0x9E3779B9u; }
  BNN_FN uint32_t second(int round) const { return k1 + static_cast<uint32_t>(round) * 0xBB67AE85u; }
};

// The same, made once and kept in memory: a CPU's vectors take them from there as they compute.
struct PhiloxRoundKeys {
  uint64_t keys[20];  // as wide as the products
  explicit PhiloxRoundKeys(PhiloxKey key) {
    for (int round = 0; round < 10; ++round) {
      keys[2 * round] = key.first(round);
      keys[2 * round + 1] = key.second(round);
    }
  }
  BNN_FN uint64_t first(int round) const { return keys[2 * round]; }
  BNN_FN uint64_t second(int round) const { return keys[2 * round + 1]; }
};

// Ten rounds, in place, of N vectors of counters: the rounds of one fill the waits of another.
template <int N, class Word, class Keys> BNN_FN void philox(Word (&x)[N][4], const Keys& keys) {
  BNN_UNROLL
  for (int round = 0; round < 10; ++round) {
    BNN_UNROLL
    for (int n = 0; n < N; ++n) {
      Word high0, low0, high1, low1;
      multiply_high_low(x[n][0], 0xD2511F53u, high0, low0);
      multiply_high_low(x[n][2], 0xCD9E8D57u, high1, low1);
      x[n][0] = high1 ^ x[n][1] ^ keys.first(round);
      x[n][1] = low1;
      x[n][2] = high0 ^ x[n][3] ^ keys.second(round);
      x[n][3] = low0;
    }
  }
}

BNN_FAST_END
