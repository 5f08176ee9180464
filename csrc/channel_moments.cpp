// Count, mean and sum of squared deviations of every channel of x[outer, channel, inner].
//
// With k_c the first counted value of channel c and d = x - k_c, exact in float64 for the narrower
// types,
//     S_c = sum d,   Q_c = sum d^2,   mean_c = k_c + S_c / n,   m2_c = Q_c - S_c^2 / n .
// The subtraction costs digits where (mean - k)^2 is far above the variance; as k_c is one of the n
// values, (mean - k)^2 <= n * variance, so the relative error of m2 is at most about n * 2^-53.
// Partial sums of blocks need no further correction, since all blocks of a channel share k_c. Q
// uses fma where the instruction set has it.
//
// Two ways through the memory, each one sequential read:
//   rows  channels (or channels x a short inner run) are contiguous: vectors along the columns,
//   eight
//         rows per visit, so that the sums in memory cost a quarter of the loads. Narrow packed
//         rows are joined into one row of k * C * inner columns: column j is channel (j / inner) %
//         C.
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
constexpr int64_t kRunLength = 8192;      // longest run between two horizontal sums
constexpr int64_t kTaskElements = 65536;  // least work worth handing to a thread

// sums and squares += the columns [0, width) of the given rows. `shift` and the sums are padded to
// whole vectors, and garbage is added to the padding.
template <class T, int kRows>
void add_rows(const T* const* rows, int64_t width, const double* shift, double* sums,
              double* squares) {
  constexpr int kParts = Wide<T>::kParts;
  constexpr int kLanes = Lanes<T>::count;
  constexpr int kHalf = Lanes<double>::count;
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t left = width - j;
    vdouble k[kParts], s[kParts], q[kParts];
    for (int p = 0; p < kParts; ++p) {
      k[p] = load(shift + j + p * kHalf);
      s[p] = load(sums + j + p * kHalf);
      q[p] = load(squares + j + p * kHalf);
    }
    for (int r = 0; r < kRows; ++r) {
      const Wide<T> x =
          to_float64<T>(left >= kLanes ? load(rows[r] + j) : load_first(rows[r] + j, left));
      for (int p = 0; p < kParts; ++p) {
        const vdouble d = x.part[p] - k[p];
        s[p] += d;
        q[p] = fma(d, d, q[p]);
      }
    }
    for (int p = 0; p < kParts; ++p) {
      store(sums + j + p * kHalf, s[p]);
      store(squares + j + p * kHalf, q[p]);
    }
  }
}

template <class T>
struct Accumulator {
  vdouble sum[Wide<T>::kParts] = {}, square[Wide<T>::kParts] = {};

  NLM_INLINE void add(typename Lanes<T>::vector value, vdouble shift) {
    const Wide<T> x = to_float64<T>(value);
    for (int p = 0; p < Wide<T>::kParts; ++p) {
      const vdouble d = x.part[p] - shift;
      sum[p] += d;
      square[p] = fma(d, d, square[p]);
    }
  }
  // Lanes whose byte in `counted` is zero add nothing, NaN and infinity included.
  NLM_INLINE void add(typename Lanes<T>::vector value, vdouble shift, const uint8_t* counted) {
    typedef uint8_t vbytes __attribute__((vector_size(kVectorBytes / 8)));
    const Wide<T> x = to_float64<T>(value);
    for (int p = 0; p < Wide<T>::kParts; ++p) {
      vbytes bytes;
      std::memcpy(&bytes, counted + p * Lanes<double>::count, sizeof bytes);
      const vint64 keep = __builtin_convertvector(bytes, vint64) != 0;
      const vdouble d = (vdouble)((vint64)(x.part[p] - shift) & keep);
      sum[p] += d;
      square[p] = fma(d, d, square[p]);
    }
  }
  NLM_INLINE void flush(double& total_sum, double& total_square) const {
    for (int p = 0; p < Wide<T>::kParts; ++p) {
      total_sum += sum_lanes(sum[p]);
      total_square += sum_lanes(square[p]);
    }
  }
};

// total_sum and total_square += one run of `length` positions.
template <class T>
void add_run(const T* x, int64_t stride, const uint8_t* mask, int64_t mask_stride, int64_t length,
             double shift, double& total_sum, double& total_square) {
  constexpr int kLanes = Lanes<T>::count;
  const vdouble k = broadcast(shift);
  Accumulator<T> accumulator;
  int64_t i = 0;
  if (stride == 1 && mask == nullptr) {
    for (; i + kLanes <= length; i += kLanes) accumulator.add(load(x + i), k);
  }
  for (; i < length; i += kLanes) {
    const int64_t count = smaller(kLanes, length - i);
    uint8_t counted[kLanes] = {};
    for (int64_t j = 0; j < count; ++j) {
      counted[j] = mask == nullptr ? 1 : mask[(i + j) * mask_stride] != 0;
    }
    accumulator.add(load_strided(x + i * stride, stride, count), k, counted);
  }
  accumulator.flush(total_sum, total_square);
}

// The position of the first counted value, and the number of counted positions.
struct Counted {
  int64_t outer = 0, inner = 0, count = 0;
};
Counted count_positions(const View3& x, const Mask2& mask) {
  Counted found;
  if (mask.data == nullptr) {
    found.count = x.outer * x.inner;
    return found;
  }
  for (int64_t o = 0; o < x.outer; ++o) {
    const int64_t before = found.count;
    for (int64_t i = 0; i < x.inner; ++i) found.count += mask.counts(o, i);
    if (before == 0 && found.count > 0) {
      found.outer = o;
      while (!mask.counts(o, found.inner)) ++found.inner;
    }
  }
  return found;
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
  for (int64_t j = 0; j < padded; ++j) shifts.data()[j] = shift[(j / plan.run) % x.channels];
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
  for (int64_t j = 0; j < plan.width; ++j) {
    sum[(j / plan.run) % x.channels] += partials.data()[j];
    square[(j / plan.run) % x.channels] += partials.data()[padded + j];
  }
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
        add_run(x.at<T>(o, c, i), x.inner_stride, counted, mask.inner_stride, length, shift[c],
                sums[c], squares[c]);
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
    for (int64_t c = 0; c < x.channels; ++c) {
      const double value = load_one(x.at<T>(counted.outer, c, counted.inner));
      shift[c] = std::isfinite(value) ? value : 0.0;  // infinity - infinity would hide the mean
    }
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
    const double spread = square[c] - sum[c] * sum[c] / n;
    m2[c] = spread < 0 ? 0 : spread;
  }
}

}  // namespace nlm::NLM_ISA
