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

// Ten rounds, in place.
template <class Word>
BNN_FN void philox(Word& x0, Word& x1, Word& x2, Word& x3, uint32_t k0, uint32_t k1) {
  BNN_UNROLL
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply_high_low(x0, 0xD2511F53u, high0, low0);
    multiply_high_low(x2, 0xCD9E8D57u, high1, low1);
    x0 = high1 ^ x1 ^ k0;
    x1 = low1;
    x2 = high0 ^ x3 ^ k1;
    x3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

BNN_FAST_END
