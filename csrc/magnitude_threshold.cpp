// The k-th largest |values - base| of a list of tensors, exactly, without a sort.
//
// Magnitudes are compared as integers: of numbers that are not negative the bits are in the order
// of the numbers, and NaN is above all of them. A sample of short runs, spread over the list,
// brackets the result. One pass over the data then counts what lies above the bracket, at its two
// ends and inside, and keeps the inside, a few values in a hundred, from which digits of 11 bits
// select the result. Where the sample misled, passes that count the digits of a known interval
// narrow it until what is inside can be kept: the result is exact, and only the time depends on
// luck.
//
// Counts are integers, so their order is of no consequence: the same bits for any number of
// threads.
#include "magnitude_threshold.h"

#include <cstring>

#include "core/parallel.h"
#include "core/simd.h"
#include "magnitude_order.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kTaskValues = 65536;
constexpr int64_t kWhole = 65536;        // of so few values all are kept
constexpr int64_t kRun = 16;             // neighbours in the sample: a cache line of float32
constexpr int64_t kValuesPerRun = 4096;  // one run of the sample for so many values, but at
constexpr int64_t kLeastRuns = 64;       // least and
constexpr int64_t kMostRuns = 8192;      // most so many
constexpr int64_t kDeviations = 6;       // half a bracket, in standard deviations of a rank
constexpr int64_t kMostKept =
    1 << 25;                    // of the bracket, so that memory does not grow with the list
constexpr int64_t kSlack = 16;  // lanes of the longest vector
constexpr int kDigitBits = 11;
constexpr int64_t kDigits = 1 << kDigitBits;

// Values strictly between the ends are kept, the others are counted.
template <class S>
struct Bracket {
  Bits<S> low, high;
};

// How many values lie above a bracket, ... below it lie the others.
struct Tally {
  int64_t above, at_high, inside, at_low;

  void operator+=(const Tally& more) {
    above += more.above;
    at_high += more.at_high;
    inside += more.inside;
    at_low += more.at_low;
  }
};

// A sink that counts all magnitudes and writes those inside of the bracket from `kept` on, while
// they end before `end`, behind which there is room for one vector.
template <class S>
struct Keep {
  using V = BitsVector<S>;
  Bracket<S> bracket;
  Bits<S>*kept, *end;
  V above = {}, from_high = {}, over_low = {}, from_low = {};

  NLM_INLINE void operator()(V value) {
    above -= (V)(value > bracket.high);
    from_high -= (V)(value >= bracket.high);
    over_low -= (V)(value > bracket.low);
    from_low -= (V)(value >= bracket.low);
    if (kept < end) append(value);
  }

  Tally tally() const {
    const int64_t sums[] = {sum_lanes(above), sum_lanes(from_high), sum_lanes(over_low),
                            sum_lanes(from_low)};
    return {sums[0], sums[1] - sums[0], sums[2] - sums[1], sums[3] - sums[2]};
  }

 private:
  NLM_INLINE void append(V value) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) {
      const __mmask16 inside = _mm512_mask_cmplt_epi32_mask(
          _mm512_cmpgt_epi32_mask((__m512i)value, _mm512_set1_epi32(bracket.low)), (__m512i)value,
          _mm512_set1_epi32(bracket.high));
      _mm512_storeu_si512(kept, _mm512_maskz_compress_epi32(inside, (__m512i)value));
      kept += __builtin_popcount(inside);
    } else {
      const __mmask8 inside = _mm512_mask_cmplt_epi64_mask(
          _mm512_cmpgt_epi64_mask((__m512i)value, _mm512_set1_epi64(bracket.low)), (__m512i)value,
          _mm512_set1_epi64(bracket.high));
      _mm512_storeu_si512(kept, _mm512_maskz_compress_epi64(inside, (__m512i)value));
      kept += __builtin_popcount(inside);
    }
#else
    for (int lane = 0; lane < Lanes<S>::count; ++lane) {
      *kept = value[lane];
      kept += (value[lane] > bracket.low) & (value[lane] < bracket.high);
    }
#endif
  }
};

// The bits by which a number's digit is its lead over `low`, for numbers of [low, high].
template <class B>
int digit_shift(B low, B high) {
  int shift = 0;
  while ((high - low) >> shift >= kDigits) ++shift;
  return shift;
}

// Narrows [low, high] to the numbers of the digit that holds the rank-th largest of those counted,
// and the rank to that among them; returns how many these are.
template <class B>
int64_t narrow(const int64_t* counts, int64_t& rank, B& low, B& high, int shift) {
  int64_t digit = (high - low) >> shift;
  while (rank > counts[digit]) rank -= counts[digit--];
  low += static_cast<B>(digit) << shift;
  const B last = low + ((B{1} << shift) - 1);
  if (last < high) high = last;
  return counts[digit];
}

// The rank-th largest of n numbers of [low, high], which it reorders.
template <class B>
B select_rank(B* values, int64_t n, int64_t rank, B low, B high, int64_t* counts) {
  while (low < high) {
    const B origin = low;
    const int shift = digit_shift(low, high);
    std::memset(counts, 0, kDigits * sizeof(int64_t));
    for (int64_t i = 0; i < n; ++i) ++counts[(values[i] - origin) >> shift];
    narrow(counts, rank, low, high, shift);
    const B digit = (low - origin) >> shift;
    int64_t same = 0;
    for (int64_t i = 0; i < n; ++i) {
      const B value = values[i];
      values[same] = value;
      same += (value - origin) >> shift == digit;
    }
    n = same;
  }
  return low;
}

// The magnitudes of a list of tensors, as one sequence that is cut into tasks.
template <class S>
class List {
 public:
  using B = Bits<S>;

  List(const MagnitudeItem* items, int64_t count, int threads)
      : items_(items), count_(count), threads_(threads), first_task_(count + 1) {
    int64_t* first = first_task_.data();
    first[0] = 0;
    for (int64_t t = 0; t < count; ++t) {
      size_ += items[t].size;
      first[t + 1] = first[t] + ceil_div(items[t].size, kTaskValues);
    }
  }

  int64_t size() const { return size_; }

  // Feeds all magnitudes, those of each task to a sink of its own: make(thread), then done(sink,
  // thread).
  template <class Make, class Done>
  void for_tasks(const Make& make, const Done& done) const {
    const int64_t* first = first_task_.data();
    parallel_for(first[count_], threads_, [&](int64_t task, int thread) {
      int64_t item = 0;
      for (int64_t above = count_; above - item > 1;) {
        const int64_t half = (item + above) / 2;
        (first[half] <= task ? item : above) = half;
      }
      const int64_t begin = (task - first[item]) * kTaskValues;
      auto sink = make(thread);
      for_magnitudes<S>(items_[item], begin, smaller(kTaskValues, items_[item].size - begin), sink);
      done(sink, thread);
    });
  }

  // Ends of a bracket that is likely to hold the rank-th largest, and how many values it holds.
  Bracket<S> guess(int64_t rank, int64_t* counts, int64_t& inside) const {
    const int64_t runs = smaller(larger(size_ / kValuesPerRun, kLeastRuns), kMostRuns);
    const Scratch<B> memory(2 * runs * kRun + kSlack);
    B* sample = memory.data();
    const int64_t n = take_sample(runs, sample);
    B* copy = sample + n;
    std::memcpy(copy, sample, static_cast<size_t>(n) * sizeof(B));
    const double share = static_cast<double>(rank) / static_cast<double>(size_);
    const double variance = static_cast<double>(n) * share * (1 - share);
    int64_t deviation = 1;
    while (static_cast<double>(deviation * deviation) < variance) ++deviation;
    const int64_t half = kDeviations * deviation + kRun;
    const int64_t middle = static_cast<int64_t>(share * static_cast<double>(n));
    Bracket<S> bracket = {-1, Order<S>::kMost};
    if (middle - half >= 1) {
      bracket.high = select_rank(sample, n, middle - half, B{0}, Order<S>::kMost, counts);
    }
    if (middle + half <= n) {
      bracket.low = select_rank(copy, n, middle + half, B{0}, Order<S>::kMost, counts);
    }
    inside = static_cast<int64_t>(static_cast<double>(size_) / static_cast<double>(n) *
                                  static_cast<double>(2 * half));
    return bracket;
  }

 private:
  // Runs of neighbours at scattered places of equal parts of the list.
  int64_t take_sample(int64_t runs, B* sample) const {
    const int64_t part = size_ / runs;
    int64_t n = 0, item = 0, begin = 0;
    for (int64_t run = 0; run < runs; ++run) {
      const uint64_t scattered = (static_cast<uint64_t>(run + 1) * 0x9e3779b97f4a7c15u) >> 32;
      const int64_t place = run * part + static_cast<int64_t>(scattered) % (part - kRun + 1);
      while (place - begin >= items_[item].size) begin += items_[item++].size;
      const int64_t length = smaller(kRun, items_[item].size - (place - begin));
      StoreMagnitudes<S> store = {sample + n};
      for_magnitudes<S>(items_[item], place - begin, length, store);
      n += length;
    }
    return n;
  }

  const MagnitudeItem* items_;
  int64_t count_;
  int threads_;
  int64_t size_ = 0;
  Scratch<int64_t> first_task_;
};

// One pass: counts all values, and keeps those inside of the bracket, if they are at most `most`.
template <class S>
Tally keep_inside(const List<S>& list, Bracket<S> bracket, int threads, int64_t most,
                  const Scratch<Bits<S>>& kept) {
  struct alignas(64) Own {
    Tally tally;
    Bits<S>* kept;
  };
  const Scratch<Own> own(threads);
  const auto begin_of = [&](int thread) { return kept.data() + thread * (most + kSlack); };
  for (int t = 0; t < threads; ++t) own.data()[t] = {{}, begin_of(t)};
  list.for_tasks(
      [&](int thread) {
        return Keep<S>{bracket, own.data()[thread].kept, begin_of(thread) + most};
      },
      [&](const Keep<S>& sink, int thread) {
        own.data()[thread].tally += sink.tally();
        own.data()[thread].kept = sink.kept;
      });
  Tally sum = {};
  for (int t = 0; t < threads; ++t) {
    const Tally& tally = own.data()[t].tally;
    if (tally.inside > 0 && sum.inside + tally.inside <= most) {
      std::memmove(kept.data() + sum.inside, begin_of(t),
                   static_cast<size_t>(tally.inside) * sizeof(Bits<S>));
    }
    sum += tally;
  }
  return sum;
}

// One pass: narrows [low, high], which holds the rank-th largest of the values in it.
template <class S>
int64_t narrow_by_digits(const List<S>& list, int64_t& rank, Bits<S>& low, Bits<S>& high,
                         int threads) {
  struct Count {
    Bits<S> low, high;
    int shift;
    int64_t* counts;
    NLM_INLINE void operator()(BitsVector<S> value) {
      for (int lane = 0; lane < Lanes<S>::count; ++lane) {
        const bool inside = value[lane] >= low && value[lane] <= high;
        ++counts[inside ? (value[lane] - low) >> shift : kDigits + lane];
      }
    }
  };
  const int shift = digit_shift(low, high);
  const int64_t row = kDigits + kSlack;
  const Scratch<int64_t> counts(threads * row);
  std::memset(counts.data(), 0, static_cast<size_t>(threads * row) * sizeof(int64_t));
  list.for_tasks([&](int thread) { return Count{low, high, shift, counts.data() + thread * row}; },
                 [](const Count&, int) {});
  for (int t = 1; t < threads; ++t) {
    for (int64_t d = 0; d < kDigits; ++d) counts.data()[d] += counts.data()[t * row + d];
  }
  return narrow(counts.data(), rank, low, high, shift);
}

template <class S>
Bits<S> threshold(const List<S>& list, int64_t rank, int threads) {
  constexpr Bits<S> kMost = Order<S>::kMost;
  const Scratch<int64_t> counts(kDigits);
  Bracket<S> bracket = {-1, kMost};
  int64_t most = list.size();
  if (list.size() > kWhole) {
    int64_t expected = 0;
    bracket = list.guess(rank, counts.data(), expected);
    most = smaller(larger(kWhole, 2 * expected), kMostKept);
  }
  const Scratch<Bits<S>> kept(threads * (most + kSlack));
  for (;;) {
    const Tally tally = keep_inside(list, bracket, threads, most, kept);
    const int64_t over_low = tally.above + tally.at_high + tally.inside;
    Bits<S> low = bracket.low + 1, high = bracket.high - 1;
    int64_t rest = rank - tally.above - tally.at_high;
    if (rank <= tally.above) {
      rest = rank;
      low = bracket.high + 1;
      high = kMost;
    } else if (rest <= 0) {
      return bracket.high;
    } else if (rank > over_low + tally.at_low) {
      rest = rank - over_low - tally.at_low;
      low = 0;
      high = bracket.low - 1;
    } else if (rank > over_low) {
      return bracket.low;
    } else if (tally.inside <= most) {
      return select_rank(kept.data(), tally.inside, rest, low, high, counts.data());
    }
    for (int64_t inside = most + 1; inside > most && low < high;) {
      inside = narrow_by_digits(list, rest, low, high, threads);
    }
    if (low == high) return low;
    bracket = {low - 1, high == kMost ? kMost : high + 1};
  }
}

template <class S>
void magnitude_threshold_as(const MagnitudeItem* items, int64_t count, int64_t rank, void* result,
                            int threads) {
  const List<S> list(items, count, threads);
  const Bits<S> bits = threshold(list, rank, threads);
  S value;
  std::memcpy(&value, &bits, sizeof value);
  if (bits > Order<S>::kInfinity) value = static_cast<S>(__builtin_nan(""));
  std::memcpy(result, &value, sizeof value);
}

}  // namespace

void magnitude_threshold(const MagnitudeItem* items, int64_t count, int64_t rank,
                         DType result_dtype, void* result, int threads) {
  if (result_dtype == DType::kFloat64) {
    magnitude_threshold_as<double>(items, count, rank, result, threads);
  } else {
    magnitude_threshold_as<float>(items, count, rank, result, threads);
  }
}

}  // namespace nlm::NLM_ISA
