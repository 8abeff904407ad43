// The generator: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
// and normals of its words by Box-Muller. The contract is in distruction/ops/reference/philox.py.
#pragma once

#include "maths.h"

namespace distruction {

static constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
static constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// The rounds from `first` on of the ten, on the counters of `groups` blocks at once, in place; more than one hides the
// multiplications' latency. Word is uint32_t, or a vector of 64-bit lanes whose low halves are the words and whose high
// halves are ignored.
template <int first, int groups, class Word>
DISTRUCTION_FN void philox(Word (&counter)[groups][4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed) + first * kWeyl0;
  uint32_t key1 = static_cast<uint32_t>(seed >> 32) + first * kWeyl1;
DISTRUCTION_UNROLL(10)
  for (int round = first; round < 10; ++round) {
DISTRUCTION_UNROLL(8)
    for (int g = 0; g < groups; ++g) {
      Word(&c)[4] = counter[g];
      Word high0, low0, high1, low1;
      multiply_wide(c[0], kMultiplier0, high0, low0);
      multiply_wide(c[2], kMultiplier1, high1, low1);
      // The high words arrive last.
      c[0] = high1 ^ (c[1] ^ key0);
      c[1] = low1;
      c[2] = high0 ^ (c[3] ^ key1);
      c[3] = low0;
    }
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

// What one call of the generator needs beside the block number (element index / 4).
struct Draw {
  uint64_t seed;
  uint32_t number;  // third word of the counter
  uint32_t sign;    // sign bit of its normals: set for the second draw of an antithetic pair
};

// With antithetic draws, draws 2i and 2i + 1 are eps and -eps.
DISTRUCTION_FN Draw draw_of(uint64_t seed, int64_t number, bool antithetic) {
  Draw draw;
  draw.seed = seed;
  draw.number = static_cast<uint32_t>(antithetic ? number >> 1 : number);
  draw.sign = antithetic ? static_cast<uint32_t>(number & 1) << 31 : 0u;
  return draw;
}

// float32((word + 1/2) * 2**-32), rounded once: both halves are exact until they meet.
template <class W>
DISTRUCTION_FN auto uniform(W word) -> decltype(as_float(word)) {
  return to_float(as_int(word >> 16)) * 0x1p-16f + (to_float(as_int(word & 0xFFFFu)) * 0x1p-32f + 0x1p-33f);
}

// Two independent standard normals, negated where `sign` is the sign bit. The angle covers the half turn where the
// cosine is positive; the angle word's lowest bit mirrors it. The polynomials of the turn contain the radius' factor
// sqrt(2 log 2): sin(pi x) for |x| <= 1/2 has a relative error of 5e-9, cos(pi x) an absolute one of 6e-8, before rounding.
template <class W, class F>
DISTRUCTION_FN void box_muller(W radius_word, W angle_word, uint32_t sign, F& cosine, F& sine) {
  const F radius = square_root(minus_log2(uniform(radius_word)));
  const F turn = to_float(as_int(angle_word)) * as_float(as_word(0x1p-32f) ^ sign), turn2 = turn * turn;
  F s = 0.09132038801908493f * turn2 - 0.7043762803077698f;
  s = s * turn2 + 3.0024776458740234f;
  s = s * turn2 - 6.084513187408447f;
  s = s * turn2 + 3.6989426612854004f;
  F c = 0.2586732506752014f * turn2 - 1.568169116973877f;
  c = c * turn2 + 4.778414726257324f;
  c = c * turn2 - 5.810274600982666f;
  c = c * turn2 + 1.1774100065231323f;
  cosine = as_float(as_word(radius * c) ^ (angle_word << 31) ^ sign);
  sine = radius * turn * s;
}

}  // namespace distruction
