// out = base + keep * scale * (expert - base), keep drawn by Philox4x32-10 (Salmon et al., Parallel
// Random Numbers: As Easy as 1, 2, 3, 2011).
//
// A counter-based generator: the random number of an entry depends on the seed and its position
// alone, so that the work is cut at will. A block of entries has its random words drawn into the
// first-level cache and used from there, which leaves the offset free to be no multiple of four.
//
// A vector of 64-bit lanes works on one counter per lane, whose words are the lanes' lower halves:
// a multiplication of these gives both halves of the product at once. What the upper halves hold is
// never read. AVX-512 draws with 2.2 instructions per entry.
#include "dare.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/parallel.h"
#include "core/simd.h"
#include "core/stream.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kBlockEntries = 1024;

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
void draw(uint64_t seed, int64_t first, int64_t count, uint32_t* words) {
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

// All bits of the lanes whose word is not below the threshold.
template <class T>
NLM_INLINE auto kept_lanes(const uint32_t* words, uint32_t threshold) {
  if constexpr (std::is_same_v<T, double>) {
    typedef uint32_t half __attribute__((vector_size(kVectorBytes / 2)));
    return (vint64)(__builtin_convertvector(load_vector<half>(words), vint64) >=
                    (vint64{} + static_cast<int64_t>(threshold)));
  } else {
    return (vint32)(load_vector<vuint32>(words) >= (vuint32{} + threshold));
  }
}

template <class T>
NLM_INLINE typename Lanes<T>::vector rescaled(typename Lanes<T>::vector expert,
                                              typename Lanes<T>::vector base, const uint32_t* words,
                                              uint32_t threshold, typename Lanes<T>::scalar scale) {
  const auto kept = kept_lanes<T>(words, threshold);
  using bits = decltype(kept + kept);
  const auto moved = base + scale * (expert - base);
  return (typename Lanes<T>::vector)((kept & (bits)moved) | (~kept & (bits)base));
}

template <class T>
void drop_entries(const T* expert, const T* base, T* out, int64_t count, const Drop& drop,
                  int threads) {
  constexpr int kLanes = Lanes<T>::count;
  const auto scale = static_cast<typename Lanes<T>::scalar>(drop.scale);
  const int64_t lead = drop.offset % 4;
  const int64_t task_entries = entries_per_task(count);
  const bool streamed = streams(out, count * static_cast<int64_t>(sizeof(T)), kLanes);
  parallel_for(ceil_div(count, task_entries), threads, [&](int64_t task, int) {
    alignas(64) uint32_t drawn[kBlockEntries + 2 * kDrawn];
    const uint32_t* words = drawn + lead;
    const int64_t end = smaller((task + 1) * task_entries, count);
    for (int64_t first = task * task_entries; first < end; first += kBlockEntries) {
      const int64_t entries = smaller(kBlockEntries, end - first);
      draw(drop.seed, drop.offset / 4 + first / 4, lead + entries, drawn);
      const T *e = expert + first, *b = base + first;
      T* o = out + first;
      int64_t i = 0;
      for (; i + kLanes <= entries; i += kLanes) {
        store(o + i, rescaled<T>(load(e + i), load(b + i), words + i, drop.threshold, scale),
              streamed);
      }
      if (i < entries) {
        const int64_t left = entries - i;
        store_first(o + i,
                    rescaled<T>(load_first(e + i, left), load_first(b + i, left), words + i,
                                drop.threshold, scale),
                    left);
      }
    }
    end_stream(streamed);
  });
}

}  // namespace

void dare(const void* expert, const void* base, void* out, DType dtype, int64_t count,
          const Drop& drop, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    drop_entries(static_cast<const T*>(expert), static_cast<const T*>(base), static_cast<T*>(out),
                 count, drop, threads);
  });
}

}  // namespace nlm::NLM_ISA
