// Count, mean and sum of squared deviations of every channel of x[outer, channel, inner].
//
// With a shift k_c, d = x - k_c in float64 and
//     S_c = sum d,   Q_c = sum d^2,
// mean_c = k_c + S_c / n and m2_c = Q_c - S_c^2 / n, the latter with S_c^2 / n in twice the digits.
// Partial sums of blocks need no further correction, since all blocks of a channel share k_c. Q
// uses fma where the instruction set has it. The difference costs digits where (mean - k)^2 is far
// above the variance:
//
//   float32, float64  k_c is the mean of the first eight counted values. For independent values the
//         difference is an eighth of the variance; in the worst case n times, as k lies among the n
//         values, so that m2 errs by at most about n * 2^-53 of itself.
//   16-bit types      k_c = 0. A square has 16 bits (22 of float16), and S and Q are exact while
//         the values other than 0 of a channel are within a factor of 2^((37 - log2 n) / 2) of each
//         other (2^((31 - log2 n) / 2)): m2 is then right to its last digits, however close to each
//         other the values are. Otherwise two of them differ by more than half of the largest one,
//         M: m2 >= M^2 / 8 and Q <= n M^2, so that m2 errs by at most about 8 n * 2^-53 of itself.
//         No subtraction, no shift to be read.
//
// Float32 is converted as it is loaded; the 16-bit types are widened to a block of float32 first:
// for 16 values that is 3 instructions on the ports of the additions, and 6 between registers.
// These ports are what bounds the 16-bit types: 7 instructions for 16 values. What is read next is
// fetched ahead: no processor finds its way through eight rows while it computes. One thread took
// 22 ms for [65536, 768] in bfloat16 without that, and 13 with it.
//
// Two ways through the memory, each one sequential read:
//   rows  channels (or channels x a short inner run) are contiguous: vectors along the columns,
//         eight rows per visit, so that the sums in memory cost a quarter of the loads. Narrow
//         packed rows are joined into one row of k * C * inner columns: column j is channel
//         (j / inner) % C.
//   runs  positions are contiguous within a channel: sums live in registers for a run.
// Blocks depend on the shape alone and are summed in order: the same bits for any number of
// threads.
#include "channel_moments.h"

#include <cmath>

#include "core/parallel.h"
#include "core/rows.h"
#include "core/simd.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kMaxBlocks = 256;      // partial sums kept per channel
constexpr int64_t kBlockRows = 128;      // least rows in a block: partials are < 4 % of the input
constexpr int64_t kBlockColumns = 1024;  // sums and shifts of a block: 24 KB, within L1
constexpr int64_t kRowGroup = 8;
constexpr int64_t kShiftSamples = 8;
constexpr int64_t kWidened = 128;         // elements of a row or run that are widened at a time
constexpr int64_t kRunLength = 8192;      // longest run between two horizontal sums
constexpr int64_t kTaskElements = 65536;  // least work worth handing to a thread
constexpr int64_t kAhead = 4096;          // bytes of a run that are fetched before they are read

template <class T>
constexpr bool kShifted = sizeof(T) > 2;

template <class T>
NLM_INLINE void prefetch_l2(const T* source, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(source + i, 0, 2);
}

// `count` elements as whole vectors of float32, or float64: where they are, if they are that, else
// in `block`, padded with `padding`.
template <class T, class S>
NLM_INLINE const S* widened_vectors(const T* x, int64_t count, S padding, S* block) {
  constexpr int kLanes = Lanes<T>::count;
  if constexpr (std::is_same_v<T, S>) {
    if (count % kLanes == 0) return x;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(block + i, load(x + i));
  if (i < count) {
    store(block + i, first_lanes<T>(count - i) ? load_first(x + i, count - i) : broadcast(padding));
  }
  return block;
}

// sums and squares += the columns [0, width) of the given rows. `shift` and the sums are padded to
// whole vectors, and garbage is added to the padding.
template <class T, int kRows>
void add_rows(const T* const* rows, int64_t width, const double* shift, double* sums,
              double* squares) {
  using S = typename Lanes<T>::scalar;
  alignas(64) S blocks[kRows][kWidened];
  const S* sources[kRows];
  for (int64_t first = 0; first < width; first += kWidened) {
    const int64_t count = smaller(kWidened, width - first);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kRows > 1) prefetch_l2(rows[r] + first + kRows * (rows[1] - rows[0]), count);
      sources[r] = widened_vectors(rows[r] + first, count, S{0}, blocks[r]);
    }
    for (int64_t j = 0; j < count; j += Lanes<double>::count) {
      vdouble k = {}, s = load(sums + first + j), q = load(squares + first + j);
      if constexpr (kShifted<T>) k = load(shift + first + j);
      for (int r = 0; r < kRows; ++r) {
        vdouble d = load_float64(sources[r] + j);
        if constexpr (kShifted<T>) d = d - k;
        s += d;
        q = fma(d, d, q);
      }
      store(sums + first + j, s);
      store(squares + first + j, q);
    }
  }
}

// block = the counted ones of `count` elements; `fill` for the others and up to a whole vector.
template <class T, class S>
void gather_run(const T* x, int64_t stride, const uint8_t* mask, int64_t mask_stride, int64_t count,
                S fill, S* block) {
  constexpr int kLanes = Lanes<T>::count;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = smaller(kLanes, count - i);
    const auto values = load_strided(x + i * stride, stride, left);
    store(block + i, first_lanes<T>(left) ? values : broadcast(fill));
  }
  for (int64_t i = 0; mask != nullptr && i < count; ++i) {
    if (mask[i * mask_stride] == 0) block[i] = fill;
  }
}

// total_sum and total_square += one run of `length` positions. The shift is a value of the type S,
// so that an element of this value adds nothing.
template <class T, class S>
void add_run(const T* x, int64_t stride, const uint8_t* mask, int64_t mask_stride, int64_t length,
             S shift, double& total_sum, double& total_square) {
  constexpr int kParts = Wide<T>::kParts;
  constexpr int kHalf = Lanes<double>::count;
  alignas(64) S block[kWidened];
  const vdouble k = broadcast(static_cast<double>(shift));
  vdouble sum[kParts] = {}, square[kParts] = {};
  for (int64_t first = 0; first < length; first += kWidened) {
    const int64_t count = smaller(kWidened, length - first);
    const T* run = x + first * stride;
    if (stride == 1) prefetch_l2(run + kAhead / sizeof(T), count);
    const S* source = block;
    if (stride == 1 && mask == nullptr) {
      source = widened_vectors(run, count, shift, block);
    } else {
      const uint8_t* counted = mask == nullptr ? mask : mask + first * mask_stride;
      gather_run(run, stride, counted, mask_stride, count, shift, block);
    }
    for (int64_t j = 0; j < count; j += Lanes<T>::count) {
      for (int p = 0; p < kParts; ++p) {
        vdouble d = load_float64(source + j + p * kHalf);
        if constexpr (kShifted<T>) d = d - k;
        sum[p] += d;
        square[p] = fma(d, d, square[p]);
      }
    }
  }
  for (int p = 1; p < kParts; ++p) {
    sum[0] += sum[p];
    square[0] += square[p];
  }
  total_sum += sum_lanes(sum[0]);
  total_square += sum_lanes(square[0]);
}

// The number of counted positions, and the first few of them.
struct Counted {
  int64_t count = 0;
  int64_t outer[kShiftSamples], inner[kShiftSamples];

  NLM_INLINE void add(int64_t o, int64_t i) {
    if (count < kShiftSamples) {
      outer[count] = o;
      inner[count] = i;
    }
    ++count;
  }
};
Counted count_positions(const View3& x, const Mask2& mask) {
  Counted found;
  const bool all = mask.data == nullptr;
  for (int64_t o = 0; o < x.outer && !(all && found.count >= kShiftSamples); ++o) {
    for (int64_t i = 0; i < x.inner; ++i) {
      if (mask.counts(o, i)) found.add(o, i);
    }
  }
  if (all) found.count = x.outer * x.inner;
  return found;
}

// k of every channel, as a value of the type that T is widened to: the mean of its first values, or
// 0 where one is not finite, since infinity - infinity would hide the mean.
template <class T>
void choose_shift(const View3& x, const Counted& counted, double* shift) {
  const int64_t samples = kShifted<T> ? smaller(counted.count, kShiftSamples) : 0;
  for (int64_t c = 0; c < x.channels; ++c) {
    double total = 0;
    for (int64_t s = 0; s < samples; ++s) {
      total += load_one(x.at<T>(counted.outer[s], c, counted.inner[s]));
    }
    const auto mean = static_cast<typename Lanes<T>::scalar>(total / larger(samples, 1));
    shift[c] = std::isfinite(mean) ? mean : 0;
  }
}

template <class T>
void sum_rows(const View3& x, const Mask2& mask, const RowPlan& plan, const double* shift,
              double* sum, double* square, int threads) {
  const int64_t block_rows = larger(kBlockRows, ceil_div(plan.rows, kMaxBlocks));
  const int64_t row_blocks = ceil_div(plan.rows, block_rows);
  const int64_t column_blocks = ceil_div(plan.width, kBlockColumns);
  const int64_t blocks = row_blocks + (plan.rest > 0);
  const int64_t padded = column_blocks * kBlockColumns;

  const Scratch<double> shifts(padded);
  plan.for_columns(padded, x.channels, [&](int64_t j, int64_t c) { shifts.data()[j] = shift[c]; });
  const Scratch<double> partials(blocks * 2 * padded);

  parallel_for(blocks * column_blocks, threads, [&](int64_t task, int) {
    const int64_t block = task / column_blocks;
    const int64_t first_column = task % column_blocks * kBlockColumns;
    const bool is_rest = block == row_blocks;
    const int64_t columns = is_rest ? plan.rest_width() : plan.width;
    const int64_t width = smaller(kBlockColumns, columns - first_column);
    double* sums = partials.data() + block * 2 * padded + first_column;
    double* squares = sums + padded;
    std::memset(sums, 0, kBlockColumns * sizeof(double));
    std::memset(squares, 0, kBlockColumns * sizeof(double));
    if (width <= 0) return;

    const double* block_shift = shifts.data() + first_column;
    const int64_t first = is_rest ? plan.rows : block * block_rows;
    const int64_t last = is_rest ? plan.rows + 1 : smaller(first + block_rows, plan.rows);
    const T* group[kRowGroup];
    int64_t filled = 0;
    for (int64_t r = first; r < last; ++r) {
      const int64_t o = plan.outer_of(r), i = plan.inner_of(r);
      if (!mask.counts(o, i)) continue;
      group[filled++] = x.at<T>(o, 0, i) + first_column;
      if (filled == kRowGroup) {
        add_rows<T, kRowGroup>(group, width, block_shift, sums, squares);
        filled = 0;
      }
    }
    for (int64_t r = 0; r < filled; ++r) {
      add_rows<T, 1>(group + r, width, block_shift, sums, squares);
    }
    // The rest row is shorter than the others: its padding is a column of theirs.
    std::memset(sums + width, 0, (kBlockColumns - width) * sizeof(double));
    std::memset(squares + width, 0, (kBlockColumns - width) * sizeof(double));
  });

  for (int64_t block = 1; block < blocks; ++block) {
    const double* partial = partials.data() + block * 2 * padded;
    for (int64_t j = 0; j < 2 * padded; ++j) partials.data()[j] += partial[j];
  }
  plan.for_columns(plan.width, x.channels, [&](int64_t j, int64_t c) {
    sum[c] += partials.data()[j];
    square[c] += partials.data()[padded + j];
  });
}

template <class T>
void sum_runs(const View3& x, const Mask2& mask, const double* shift, double* sum, double* square,
              int threads) {
  const int64_t run = smaller(x.inner, kRunLength);
  const int64_t runs = ceil_div(x.inner, run);
  const int64_t units = x.outer * runs;  // one unit: a run of every channel
  const int64_t block_channels = larger(1, smaller(x.channels, kTaskElements / run));
  const int64_t block_units = larger(ceil_div(kTaskElements, run * block_channels),  //
                                     ceil_div(units, kMaxBlocks));
  const int64_t channel_blocks = ceil_div(x.channels, block_channels);
  const int64_t unit_blocks = ceil_div(units, block_units);
  const Scratch<double> partials(unit_blocks * 2 * x.channels);

  parallel_for(unit_blocks * channel_blocks, threads, [&](int64_t task, int) {
    const int64_t block = task / channel_blocks;
    const int64_t first = task % channel_blocks * block_channels;
    const int64_t last = smaller(first + block_channels, x.channels);
    double* sums = partials.data() + block * 2 * x.channels;
    double* squares = sums + x.channels;
    for (int64_t c = first; c < last; ++c) sums[c] = squares[c] = 0;
    const int64_t last_unit = smaller((block + 1) * block_units, units);
    for (int64_t unit = block * block_units; unit < last_unit; ++unit) {
      const int64_t o = unit / runs;
      const int64_t i = unit % runs * run;
      const int64_t length = smaller(run, x.inner - i);
      const uint8_t* counted = mask.data;
      if (counted != nullptr) counted += o * mask.outer_stride + i * mask.inner_stride;
      for (int64_t c = first; c < last; ++c) {
        add_run(x.at<T>(o, c, i), x.inner_stride, counted, mask.inner_stride, length,
                static_cast<typename Lanes<T>::scalar>(shift[c]), sums[c], squares[c]);
      }
    }
  });

  for (int64_t block = 0; block < unit_blocks; ++block) {
    const double* partial = partials.data() + block * 2 * x.channels;
    for (int64_t c = 0; c < x.channels; ++c) {
      sum[c] += partial[c];
      square[c] += partial[x.channels + c];
    }
  }
}

}  // namespace

void channel_moments(const View3& given, const Mask2& given_mask, int64_t* count, double* mean,
                     double* m2, int threads) {
  const bool vector = given.inner == 1 && given.channels == 1;
  const View3 x = vector ? as_run(given) : given;
  const Mask2 mask = vector ? Mask2{given_mask.data, 0, given_mask.outer_stride} : given_mask;
  for (int64_t c = 0; c < x.channels; ++c) mean[c] = m2[c] = 0;
  const Counted counted = count_positions(x, mask);
  *count = counted.count;
  if (counted.count == 0 || x.channels == 0) return;

  const Scratch<double> sums(3 * x.channels);
  double* shift = sums.data();
  double* sum = shift + x.channels;
  double* square = sum + x.channels;
  for (int64_t c = 0; c < 2 * x.channels; ++c) sum[c] = 0;

  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    choose_shift<T>(x, counted, shift);
    const View3* views[] = {&x};
    const bool all = mask.data == nullptr;
    const RowPlan plan = plan_rows(views, 1, all, all);
    if (plan.rows > 0) {
      sum_rows<T>(x, mask, plan, shift, sum, square, threads);
    } else {
      sum_runs<T>(x, mask, shift, sum, square, threads);
    }
  });

  const double n = static_cast<double>(counted.count);
  for (int64_t c = 0; c < x.channels; ++c) {
    mean[c] = shift[c] + sum[c] / n;
    const double product = sum[c] * sum[c], product_error = std::fma(sum[c], sum[c], -product);
    const double part = product / n, part_error = std::fma(-part, n, product) + product_error;
    const double spread = square[c] - part - part_error / n;
    m2[c] = spread < 0 ? 0 : spread;
  }
}

}  // namespace nlm::NLM_ISA
