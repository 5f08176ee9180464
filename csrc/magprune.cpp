// out = x * m, where m of an entry follows from its rank among the magnitudes of its row and from a
// random word of that rank (DELLA's MagPrune).
//
// Entries become (magnitude, place) in one item, which are sorted by counting from the lowest digit
// of the magnitude on: a pass keeps the order of equal digits, so that of equal magnitudes the
// first comes first. Digits in which all entries agree are passed over. Then the words of the ranks
// are drawn in order, what each entry is multiplied by goes to its place in a row of the cache, and
// one pass multiplies. A row of 4096 stays in the second-level cache throughout.
#include "magprune.h"

#include "core/parallel.h"
#include "core/philox.h"
#include "core/simd.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kTaskEntries = 1 << 15;
constexpr int64_t kInserted = 32;     // so few are sorted by insertion
constexpr int64_t kNarrow = 1 << 16;  // so few are sorted by digits of 8 bits, more by 11
constexpr int kBlockWords = 1024;

// The magnitude of an entry in its bits, and its place.
struct Item32 {
  uint32_t place, bits;
  static constexpr int kBits = 31;
};
struct Item64 {
  uint64_t place, bits;
  static constexpr int kBits = 63;
};
template <class Scalar>
using ItemOf = std::conditional_t<std::is_same_v<Scalar, double>, Item64, Item32>;

NLM_INLINE uint32_t magnitude_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
}
NLM_INLINE uint64_t magnitude_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & ~(uint64_t{1} << 63);
}

template <class Item>
void insert_each(Item* items, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const Item item = items[i];
    int64_t k = i;
    for (; k > 0 && items[k - 1].bits > item.bits; --k) items[k] = items[k - 1];
    items[k] = item;
  }
}

// Sorts by kDigit bits at a time; the result lies in `items` or in `other`.
template <int kDigit, class Item>
Item* sort_by_digits(Item* items, Item* other, int64_t count) {
  constexpr int kPasses = (Item::kBits + kDigit - 1) / kDigit;
  constexpr int kBins = 1 << kDigit;
  uint32_t counts[kPasses][kBins];
  std::memset(counts, 0, sizeof counts);
  for (int64_t i = 0; i < count; ++i) {
    auto bits = items[i].bits;
    for (int p = 0; p < kPasses; ++p) {
      ++counts[p][bits % kBins];
      bits >>= kDigit;
    }
  }
  for (int p = 0; p < kPasses; ++p) {
    const int shift = p * kDigit;
    if (counts[p][(items[0].bits >> shift) % kBins] == count) continue;
    uint32_t begin = 0;
    for (int d = 0; d < kBins; ++d) {
      const uint32_t here = counts[p][d];
      counts[p][d] = begin;
      begin += here;
    }
    for (int64_t i = 0; i < count; ++i) {
      other[counts[p][(items[i].bits >> shift) % kBins]++] = items[i];
    }
    Item* const sorted = other;
    other = items;
    items = sorted;
  }
  return items;
}

template <class Item>
Item* sorted(Item* items, Item* other, int64_t count) {
  if (count <= kInserted) {
    insert_each(items, count);
    return items;
  }
  return count <= kNarrow ? sort_by_digits<8>(items, other, count)
                          : sort_by_digits<11>(items, other, count);
}

// What each of `count` entries is multiplied by, at its place.
template <class Scalar, class Item>
void multipliers(const Item* ranked, int64_t count, uint64_t seed, int64_t position,
                 const RankChances& chances, Scalar* out) {
  const int64_t lead = position % 4;
  alignas(64) uint32_t drawn[kBlockWords + 2 * kDrawn];
  for (int64_t first = 0; first < count; first += kBlockWords) {
    const int64_t entries = smaller(kBlockWords, count - first);
    draw(seed, position / 4 + first / 4, lead + entries, drawn);
    for (int64_t r = 0; r < entries; ++r) {
      const bool kept = drawn[lead + r] >= chances.least[first + r];
      out[ranked[first + r].place] =
          kept ? static_cast<Scalar>(chances.factors[first + r]) : Scalar{0};
    }
  }
}

template <class T>
void prune_rows(const RankedRows& work, int threads) {
  using Scalar = typename Lanes<T>::scalar;
  using Item = ItemOf<Scalar>;
  constexpr int kLanes = Lanes<T>::count;
  const int64_t longest = smaller(work.segment, work.length);
  const int64_t segments = ceil_div(work.length, work.segment);
  const int64_t all = work.rows * segments;
  const int64_t together = larger(1, kTaskEntries / longest);
  const int64_t tasks = ceil_div(all, together);
  const int team = static_cast<int>(smaller(threads, tasks));
  const int64_t padded = ceil_div(longest, 64) * 64;
  const Scratch<Item> items(2 * padded * team);
  const Scratch<Scalar> factors(padded * team);
  parallel_for(tasks, team, [&](int64_t task, int thread) {
    Item* const here = items.data() + 2 * padded * thread;
    Scalar* const multiplier = factors.data() + padded * thread;
    const int64_t end = smaller((task + 1) * together, all);
    for (int64_t each = task * together; each < end; ++each) {
      const int64_t part = each % segments * work.segment;
      const int64_t begin = each / segments * work.length + part;
      const int64_t count = smaller(work.segment, work.length - part);
      const bool is_whole = count == longest;
      const T* x = static_cast<const T*>(work.x) + begin;
      T* out = static_cast<T*>(work.out) + begin;
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = count - i;
        const auto values = left >= kLanes ? load(x + i) : load_first(x + i, left);
        for (int64_t k = 0; k < smaller(kLanes, left); ++k) {
          using Place = decltype(Item::place);
          here[i + k] = {static_cast<Place>(i + k), magnitude_bits(static_cast<Scalar>(values[k]))};
        }
      }
      const Item* const ranked = sorted(here, here + padded, count);
      multipliers(ranked, count, work.seed, work.offset + begin, is_whole ? work.whole : work.last,
                  multiplier);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        store(out + i, load(x + i) * load(multiplier + i));
      }
      if (i < count) {
        const int64_t left = count - i;
        store_first(out + i, load_first(x + i, left) * load_first(multiplier + i, left), left);
      }
    }
  });
}

}  // namespace

void magprune(const RankedRows& work, int threads) {
  if (work.rows == 0 || work.length == 0) return;
  with_dtype(work.dtype, [&](auto type) { prune_rows<decltype(type)>(work, threads); });
}

}  // namespace nlm::NLM_ISA
