// The generator in vectors: words and normals of consecutive elements, in the order of the elements.
#pragma once

#include "vector.h"  // first: the generator's templates find its overloads

#include "../generator.h"

namespace distruction {
namespace {

// Normals that one round of the generator's loop makes: four vectors of counters in flight.
constexpr int kUnit = 8 * kLanes;

// The block whose counter stands in 32-bit lane `lane`, such that transposing four by four within 128 bits, the only
// cheap direction, gives the normals in the order of the elements.
constexpr uint64_t block_of_lane(int lane) { return static_cast<uint64_t>(kLanes / 4 * (lane % 4) + lane / 4); }

struct LaneBlocks {
  uint64_t of[2][kLanes / 2];
  constexpr LaneBlocks() : of() {
    for (int i = 0; i < kLanes; ++i) of[i % 2][i / 2] = block_of_lane(i);
  }
};
constexpr LaneBlocks kLaneBlocks;

// The low words of two vectors of 64-bit lanes, as the even and the odd lanes of one vector of words.
DISTRUCTION_FN Word pack(Wide even, Wide odd) {
#if defined(__AVX512F__)
  return (Word)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, (_MM_PERM_ENUM)0xA0);
#elif defined(__AVX2__)
  return (Word)_mm256_blend_epi32((__m256i)even, _mm256_shuffle_epi32((__m256i)odd, 0xA0), 0xAA);
#else
  return (Word)((even & 0xFFFFFFFFu) | (odd << 32));
#endif
}

DISTRUCTION_FN void store_transposed(uint32_t* out, const Word (&x)[4]) {
  const Word a = interleave<false>(x[0], x[1]), b = interleave<false>(x[2], x[3]);
  const Word c = interleave<true>(x[0], x[1]), d = interleave<true>(x[2], x[3]);
  store(out, interleave_pairs<false>(a, b));
  store(out + kLanes, interleave_pairs<true>(a, b));
  store(out + 2 * kLanes, interleave_pairs<false>(c, d));
  store(out + 3 * kLanes, interleave_pairs<true>(c, d));
}

// The counters (low[g], high, number, stream) after three rounds of the generator; what they share, three of four words,
// is multiplied once.
DISTRUCTION_FN void three_rounds(
    const Wide (&low)[4], uint32_t high, uint32_t number, uint32_t stream, uint64_t seed, Wide (&counter)[4][4]) {
  uint32_t key0[3], key1[3];
  for (uint32_t round = 0; round < 3; ++round) {
    key0[round] = static_cast<uint32_t>(seed) + round * kWeyl0;
    key1[round] = static_cast<uint32_t>(seed >> 32) + round * kWeyl1;
  }
  uint32_t high1, low1, high0, low0;
  multiply_wide(number, kMultiplier1, high1, low1);
  multiply_wide(high1 ^ high ^ key0[0], kMultiplier0, high0, low0);
  for (int g = 0; g < 4; ++g) {
    Wide(&c)[4] = counter[g];
    Wide h, l, next;
    multiply_wide(low[g], kMultiplier0, h, l);
    c[2] = l ^ (high0 ^ key1[1]);
    multiply_wide(h ^ (stream ^ key1[0]), kMultiplier1, h, c[1]);
    multiply_wide(h ^ (low1 ^ key0[1]), kMultiplier0, h, c[3]);
    multiply_wide(c[2], kMultiplier1, next, l);
    c[0] = next ^ (c[1] ^ key0[2]);
    c[1] = l;
    c[2] = h ^ (low0 ^ key1[2]);
  }
}

// Float arrays that the loop after the generator reads: it leaves memory idle, so the arrays are fetched meanwhile.
struct Ahead {
  const float* const* begin;
  const float* const* end;

  // The elements from `first` on that belong to one round of the generator's loop.
  inline __attribute__((always_inline)) void fetch(int first) const {
    constexpr int kLine = 16;  // of a cache
    for (const float* const* array = begin; array != end; ++array)
      for (int i = 0; i < kUnit; i += kLine) __builtin_prefetch(*array + first + i);
  }
};

// The words, the normals or both of `count` elements from generator block `block` on, rounded up to whole units. The
// blocks share the high word of their numbers.
template <bool with_words, bool with_normals>
DISTRUCTION_NOINLINE void generate(
    uint64_t block, int count, Draw draw, uint32_t stream, uint32_t* __restrict words, float* __restrict eps,
    Ahead ahead) {
  for (int done = 0; done < count; done += kUnit) {
    ahead.fetch(done);
    Wide low[4], c[4][4];
    for (int g = 0; g < 4; ++g)
      low[g] = load<Wide>(kLaneBlocks.of[g % 2]) + (block + static_cast<uint64_t>(done / 4 + g / 2 * kLanes));
    three_rounds(low, static_cast<uint32_t>(block >> 32), draw.number, stream, draw.seed, c);
    philox<3>(c, draw.seed);
    for (int p = 0; p < 2; ++p) {
      Word w[4];
      for (int j = 0; j < 4; ++j) w[j] = pack(c[2 * p][j], c[2 * p + 1][j]);
      if (with_words) store_transposed(words + done + p * 4 * kLanes, w);
      if (with_normals) {
        Float n[4];
        box_muller(w[0], w[1], draw.sign, n[0], n[1]);
        box_muller(w[2], w[3], draw.sign, n[2], n[3]);
        const Word bits[4] = {as_word(n[0]), as_word(n[1]), as_word(n[2]), as_word(n[3])};
        store_transposed(reinterpret_cast<uint32_t*>(eps) + done + p * 4 * kLanes, bits);
      }
    }
  }
}

}  // namespace
}  // namespace distruction
