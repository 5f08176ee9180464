// TALL-masks in bits: built from three reads, applied with two reads and one write, counted.
//
// A task takes 64 entries at a time, so that their bits are one word. The difference,
// its magnitude, the product with the limit and the comparison are those of the plain expression in
// float32 (float64 for float64): the masks are the same in every bit.
//
// Masks are counted entry by entry in parallel: plane p holds bit p of the counts of a vector's
// entries, and a mask is added to the planes as to a binary counter.
#include "tall_mask.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/parallel.h"
#include "core/simd.h"
#include "core/stream.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kTaskBytes = 16384;  // of each mask that is counted
constexpr int kWordEntries = 64;

NLM_INLINE vfloat absolute(vfloat value) { return (vfloat)((vuint32)value & 0x7fffffffu); }
NLM_INLINE vdouble absolute(vdouble value) { return (vdouble)((vint64)value & 0x7fffffffffffffff); }

// Bit i is a[i] > b[i].
#if defined(__AVX512F__)
NLM_INLINE uint64_t greater(vfloat a, vfloat b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
}
NLM_INLINE uint64_t greater(vdouble a, vdouble b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
}
#elif defined(__AVX2__)
NLM_INLINE uint64_t greater(vfloat a, vfloat b) { return _mm256_movemask_ps((__m256)(a > b)); }
NLM_INLINE uint64_t greater(vdouble a, vdouble b) { return _mm256_movemask_pd((__m256d)(a > b)); }
#elif defined(__SSE2__)
NLM_INLINE uint64_t greater(vfloat a, vfloat b) { return _mm_movemask_ps((__m128)(a > b)); }
NLM_INLINE uint64_t greater(vdouble a, vdouble b) { return _mm_movemask_pd((__m128d)(a > b)); }
#else
template <class V>
NLM_INLINE uint64_t greater(V a, V b) {
  uint64_t bits = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) bits |= uint64_t{a[i] > b[i]} << i;
  return bits;
}
#endif

template <class V, class S>
NLM_INLINE uint64_t lives(V expert, V base, V merged, S limit) {
  return greater(absolute(expert - base), absolute(expert - merged) * limit);
}

template <class T>
void build(const T* expert, const T* base, const T* merged, int64_t count,
           typename Lanes<T>::scalar limit, uint8_t* mask, int threads) {
  constexpr int kLanes = Lanes<T>::count;
  const int64_t entries = entries_per_task(count);
  parallel_for(ceil_div(count, entries), threads, [&](int64_t task, int) {
    const int64_t end = smaller((task + 1) * entries, count);
    for (int64_t i = task * entries; i < end; i += kWordEntries) {
      uint64_t bits = 0;
      if (i + kWordEntries <= end) {
        for (int j = 0; j < kWordEntries; j += kLanes) {
          bits |= lives(load(expert + i + j), load(base + i + j), load(merged + i + j), limit) << j;
        }
        std::memcpy(mask + i / 8, &bits, sizeof bits);
        continue;
      }
      for (int64_t j = i; j < end; j += kLanes) {
        const int64_t left = smaller(end - j, kLanes);
        bits |= lives(load_strided(expert + j, 1, left), load_strided(base + j, 1, left),
                      load_strided(merged + j, 1, left), limit)
                << (j - i);
      }
      std::memcpy(mask + i / 8, &bits, ceil_div(end - i, 8));
    }
  });
}

template <class W>
void select_words(const uint8_t* mask, const void* base_words, const void* merged_words,
                  int64_t count, void* out_words, int threads) {
  constexpr int kLanes = kVectorBytes / (sizeof(W) < 4 ? 4 : sizeof(W));  // one bit of W for each
  typedef W vector __attribute__((vector_size(kLanes * sizeof(W))));
  const W* base = static_cast<const W*>(base_words);
  const W* merged = static_cast<const W*>(merged_words);
  W* out = static_cast<W*>(out_words);
  vector own_bit = {};
  for (int lane = 0; lane < kLanes; ++lane) own_bit[lane] = static_cast<W>(W{1} << lane);
  const int64_t entries = entries_per_task(count);
  const bool streamed = streams(out, count * static_cast<int64_t>(sizeof(W)), kLanes);
  parallel_for(ceil_div(count, entries), threads, [&](int64_t task, int) {
    const int64_t end = smaller((task + 1) * entries, count);
    int64_t i = task * entries;
    for (; i + kWordEntries <= end; i += kWordEntries) {
      uint64_t bits;
      std::memcpy(&bits, mask + i / 8, sizeof bits);
      for (int j = 0; j < kWordEntries; j += kLanes) {
        const W word = static_cast<W>(bits >> j);
        const vector set = (vector)(((word + vector{}) & own_bit) != 0);
        const vector result = (set & load_vector<vector>(merged + i + j)) |
                              (~set & load_vector<vector>(base + i + j));
        if (streamed) {
          stream_vector(out + i + j, result);
        } else {
          std::memcpy(out + i + j, &result, sizeof result);
        }
      }
    }
    for (; i < end; ++i) out[i] = mask[i / 8] >> i % 8 & 1 ? merged[i] : base[i];
    end_stream(streamed);
  });
}

typedef uint64_t vuint64 __attribute__((vector_size(kVectorBytes)));

// Where the counts in `planes` are at least `least` < 2^kPlanes.
template <int kPlanes>
NLM_INLINE vuint64 at_least(const vuint64* planes, int64_t least) {
  vuint64 more = {};
  vuint64 equal = ~vuint64{};  // so far, from the highest plane
  for (int p = kPlanes - 1; p >= 0; --p) {
    if (least >> p & 1) {
      equal &= planes[p];
    } else {
      more |= equal & planes[p];
      equal &= ~planes[p];
    }
  }
  return more | equal;
}

template <int kPlanes>
int64_t agree(const uint8_t* masks, int64_t tasks, int64_t bytes, int64_t least, uint8_t* kept,
              int threads) {
  const int64_t blocks = ceil_div(bytes, kTaskBytes);
  const Scratch<int64_t> counts(blocks);
  parallel_for(blocks, threads, [&](int64_t block, int) {
    const int64_t end = smaller((block + 1) * kTaskBytes, bytes);
    int64_t count = 0;
    for (int64_t i = block * kTaskBytes; i < end; i += kVectorBytes) {
      const bool full = i + kVectorBytes <= end;
      vuint64 planes[kPlanes] = {};
      for (int64_t t = 0; t < tasks; ++t) {
        vuint64 carry = {};
        const uint8_t* source = masks + t * bytes + i;
        full ? std::memcpy(&carry, source, sizeof carry) : std::memcpy(&carry, source, end - i);
        for (int p = 0; p < kPlanes; ++p) {
          const vuint64 next = planes[p] & carry;
          planes[p] ^= carry;
          carry = next;
        }
      }
      const vuint64 result = at_least<kPlanes>(planes, least);
      full ? std::memcpy(kept + i, &result, sizeof result)
           : std::memcpy(kept + i, &result, end - i);
      for (unsigned word = 0; word < sizeof result / 8; ++word) {
        count += __builtin_popcountll(result[word]);
      }
    }
    counts.data()[block] = count;
  });
  int64_t total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += counts.data()[block];
  return total;
}

}  // namespace

void tall_mask(const void* expert, const void* base, const void* merged, DType dtype, int64_t count,
               double limit, uint8_t* mask, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    build(static_cast<const T*>(expert), static_cast<const T*>(base), static_cast<const T*>(merged),
          count, static_cast<typename Lanes<T>::scalar>(limit), mask, threads);
  });
}

void tall_mask_apply(const uint8_t* mask, const void* base, const void* merged, int element_bytes,
                     int64_t count, void* out, int threads) {
  if (element_bytes == 2) return select_words<uint16_t>(mask, base, merged, count, out, threads);
  if (element_bytes == 4) return select_words<uint32_t>(mask, base, merged, count, out, threads);
  select_words<uint64_t>(mask, base, merged, count, out, threads);
}

void tall_mask_agreement(const uint8_t* masks, int64_t tasks, int64_t bytes, int64_t least,
                         uint8_t* kept, int64_t* count, int threads) {
  *count = 0;
  if (least > tasks) {
    if (bytes > 0) std::memset(kept, 0, bytes);
  } else if (tasks < 2) {
    *count = agree<1>(masks, tasks, bytes, least, kept, threads);
  } else if (tasks < 4) {
    *count = agree<2>(masks, tasks, bytes, least, kept, threads);
  } else if (tasks < 16) {
    *count = agree<4>(masks, tasks, bytes, least, kept, threads);
  } else {
    *count = agree<8>(masks, tasks, bytes, least, kept, threads);
  }
}

}  // namespace nlm::NLM_ISA
