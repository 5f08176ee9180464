// Random words by Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
//
// A vector of 64-bit lanes works on one counter per lane, whose words are the lanes' lower halves:
// a multiplication of these gives both halves of the product at once. What the upper halves hold is
// never read. AVX-512 draws with 2.2 instructions per word.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "philox_constants.h"
#include "simd.h"

namespace nlm::NLM_ISA {

typedef uint64_t vuint64 __attribute__((vector_size(kVectorBytes)));
constexpr int kCounters = kVectorBytes / 8;
// Vectors of counters at once, whose multiplications fill each other's waits: 10 % faster than one.
constexpr int kChains = kVectorBytes == 64 ? 4 : 2;
constexpr int kDrawn = 4 * kCounters * kChains;  // words of a draw

// The product of the lower halves of the lanes; their upper halves, moved down, above which
// anything may stand (a shuffle: shifts wait for the multiplier's port); the even and the odd lanes
// of pairs.
#if defined(__AVX512F__)
NLM_INLINE vuint64 upper_halves(vuint64 x) {
  return (vuint64)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_DDBB);
}
NLM_INLINE vuint64 multiply(vuint64 a, vuint64 b) {
  return (vuint64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
NLM_INLINE vuint64 even_lanes(vuint64 a, vuint64 b) {
  return (vuint64)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
}
NLM_INLINE vuint64 odd_lanes(vuint64 a, vuint64 b) {
  return (vuint64)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
NLM_INLINE vuint64 upper_halves(vuint64 x) {
  return (vuint64)_mm256_shuffle_epi32((__m256i)x, 0xf5);
}
NLM_INLINE vuint64 multiply(vuint64 a, vuint64 b) {
  return (vuint64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
NLM_INLINE vuint64 even_lanes(vuint64 a, vuint64 b) {
  return (vuint64)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
}
NLM_INLINE vuint64 odd_lanes(vuint64 a, vuint64 b) {
  return (vuint64)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
}
#else
#if defined(__SSE2__)
NLM_INLINE vuint64 upper_halves(vuint64 x) { return (vuint64)_mm_shuffle_epi32((__m128i)x, 0xf5); }
NLM_INLINE vuint64 multiply(vuint64 a, vuint64 b) {
  return (vuint64)_mm_mul_epu32((__m128i)a, (__m128i)b);
}
#else
NLM_INLINE vuint64 upper_halves(vuint64 x) { return x >> 32; }
NLM_INLINE vuint64 multiply(vuint64 a, vuint64 b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif
NLM_INLINE vuint64 even_lanes(vuint64 a, vuint64 b) { return vuint64{a[0], b[0]}; }
NLM_INLINE vuint64 odd_lanes(vuint64 a, vuint64 b) { return vuint64{a[1], b[1]}; }
#endif

// words[4 c + w] = word w of counter first + c, for as many counters as give `count` words, rounded
// up to whole draws.
inline void draw(uint64_t seed, int64_t first, int64_t count, uint32_t* words) {
  const vuint64 low_half = vuint64{} + 0xffffffffu;
  vuint64 order = {};  // the even lanes hold the first counters, the odd ones those behind them
  for (int lane = 0; lane < kCounters; ++lane) order[lane] = lane / 2 + lane % 2 * kCounters / 2;
  for (int64_t i = 0; i < count; i += kDrawn) {
    vuint64 x0[kChains], x1[kChains], x2[kChains], x3[kChains];
    for (int c = 0; c < kChains; ++c) {
      x0[c] = static_cast<uint64_t>(first + i / 4 + c * kCounters) + order;
      x1[c] = x0[c] >> 32;
      x2[c] = x3[c] = vuint64{};
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int c = 0; c < kChains; ++c) {
        const vuint64 product0 = multiply(x0[c], vuint64{} + kPhiloxMultiplier0);
        const vuint64 product1 = multiply(x2[c], vuint64{} + kPhiloxMultiplier1);
        x0[c] = upper_halves(product1) ^ x1[c] ^ (vuint64{} + key0);
        x2[c] = upper_halves(product0) ^ x3[c] ^ (vuint64{} + key1);
        x1[c] = product1;
        x3[c] = product0;
      }
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    for (int c = 0; c < kChains; ++c) {
      const vuint64 front = (x0[c] & low_half) | (x1[c] << 32);
      const vuint64 back = (x2[c] & low_half) | (x3[c] << 32);
      const vuint64 drawn[2] = {even_lanes(front, back), odd_lanes(front, back)};
      std::memcpy(words + i + c * 4 * kCounters, drawn, sizeof drawn);
    }
  }
}

}  // namespace nlm::NLM_ISA
