// Joint moments of two streams, x [n, cx] and y [n, cy]: a matrix product of deviations.
//
// The samples are taken in blocks of 2048. A block goes through two parallel passes:
//   load      copies 64 channels, widened to float32 (float64 for float64), into panels
//             [sample][lane] of one vector of channels each, whatever the layout of the tensor;
//             takes each channel's mean and sum of squared deviations in float64; and leaves the
//             deviations in the panel, divided by a power of two: their largest is near 1;
//   multiply  sums dx dy^T over the block for one tile of the matrix, and merges it into the state
//             with Chan's n_a n_b / (n_a + n_b) delta_x delta_y^T.
//
// Numerics. A deviation is rounded to float32 once, after the subtraction in float64, so a large
// mean costs nothing; the power of two keeps products of tiny or huge channels from under- or
// overflowing. core/product.h has the rest, and the blocking; core/tiles.h has both for AMX.
#include "cross_moments.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "core/parallel.h"
#include "core/product.h"
#include "core/simd.h"
#include "core/tiles.h"
#include "core/transpose.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kBlock = 2048;      // samples that are centred together
constexpr int64_t kSerial = 1 << 20;  // products below which threads cost more than they save

// Elements from panel to panel of a block of at most `capacity` samples; whole tiles of 32 fit.
template <class S>
int64_t room_stride(int64_t capacity) {
  return (ceil_div(capacity, 32) * 32 + 1) * Lanes<S>::count;
}

// The counted positions of a block, in order. run[k] positions from k on lie in one row of `inner`.
struct Samples {
  int64_t outer[kBlock];
  int64_t inner[kBlock];
  int64_t run[kBlock];
  int64_t count;

  // Takes positions from `position` on (outer * inner_size + inner) and moves it behind the last.
  void collect(const View3& x, const Mask2& mask, int64_t& position) {
    const int64_t end = x.outer * x.inner;
    int64_t o = x.inner > 0 ? position / x.inner : 0;
    int64_t i = x.inner > 0 ? position % x.inner : 0;
    for (count = 0; position < end && count < kBlock; ++position) {
      if (mask.counts(o, i)) {
        outer[count] = o;
        inner[count] = i;
        ++count;
      }
      if (++i == x.inner) {
        i = 0;
        ++o;
      }
    }
    for (int64_t k = count - 1; k >= 0; --k) {
      const bool joined = k + 1 < count && outer[k + 1] == outer[k] && inner[k + 1] == inner[k] + 1;
      run[k] = joined ? run[k + 1] + 1 : 1;
    }
  }
};

// An operand of core/product.h, whose deviations are taken where they are packed. Channels behind
// the last one are 0. An odd number of cache lines between panels keeps the same sample of
// neighbouring panels out of the same cache set.
template <class S>
class Panels {
 public:
  using Scalar = S;
  static constexpr int64_t kLanes = Lanes<S>::count;
  static constexpr int64_t kStep = 1;  // panels that are multiplied together
  static constexpr bool kInPlace = true;

  Panels(int64_t channel_count, int64_t capacity, bool, bool)
      : channels(channel_count),
        stride(room_stride<S>(capacity)),
        values_(ceil_div(channels, kLanes) * stride) {}

  S* panel(int64_t p) const { return values_.data() + p * stride; }
  S* room(int64_t p, S*) const { return panel(p); }
  void keep(int64_t, S*, int64_t) const {}

  const int64_t channels, stride;

 private:
  Scratch<S> values_;
};

template <class S>
void multiply_region(const Panels<S>& x, const Panels<S>& y, bool same, const Region& region,
                     int64_t samples, double* tile) {
  multiply_tile<S>(x, y, same, region, samples, tile);
}

// One stream's block.
template <class Operand>
struct Stream {
  static constexpr int64_t kLanes = Operand::kLanes;

  Stream(int64_t channel_count, int64_t capacity, bool left, bool right)
      : channels(channel_count),
        filled(ceil_div(channels, kLanes)),
        panels(ceil_div(filled, Operand::kStep) * Operand::kStep),
        operand(channels, capacity, left, right),
        mean(filled * kLanes),
        m2(filled * kLanes),
        scale(filled * kLanes),
        delta(filled * kLanes) {}

  int64_t channels, filled, panels;  // filled: those that hold channels
  Operand operand;
  Scratch<double> mean, m2, scale;  // of the block; the deviations are values * scale
  Scratch<double> delta;            // the block's mean less the state's
};

// Copies the samples of panels [begin, end) to values[panel][sample][lane], `stride` apart.
template <class T, class S>
void pack(const View3& view, const Samples& samples, int64_t begin, int64_t end, S* values,
          int64_t stride) {
  constexpr int64_t kLanes = Lanes<T>::count;
  if (view.channel_stride == 1) {
    constexpr int64_t kAhead = 16;  // rows; the processor foresees no short pieces of rows
    const int64_t bytes = (end - begin) * kLanes * static_cast<int64_t>(sizeof(T));
    for (int64_t k = 0; k < samples.count; ++k) {
      const T* row = view.at<T>(samples.outer[k], 0, samples.inner[k]);
      const int64_t later = smaller(k + kAhead, samples.count - 1);
      const char* next = reinterpret_cast<const char*>(
          view.at<T>(samples.outer[later], begin * kLanes, samples.inner[later]));
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(next + byte);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t left = view.channels - p * kLanes;
        const T* source = row + p * kLanes;
        store(values + (p - begin) * stride + k * kLanes,
              left < kLanes ? load_first(source, left) : load(source));
      }
    }
    return;
  }
  for (int64_t p = begin; p < end; ++p) {
    const int64_t c = p * kLanes;
    const int64_t channels = smaller(kLanes, view.channels - c);
    for (int64_t k = 0; k < samples.count;) {
      const T* source = view.at<T>(samples.outer[k], c, samples.inner[k]);
      S* target = values + (p - begin) * stride + k * kLanes;
      if (view.inner_stride == 1 && samples.run[k] >= kLanes) {
        typename Lanes<T>::vector square[kLanes] = {};
        for (int64_t lane = 0; lane < channels; ++lane) {
          square[lane] = load(source + lane * view.channel_stride);
        }
        transpose(square);
        for (int64_t i = 0; i < kLanes; ++i) store(target + i * kLanes, square[i]);
        k += kLanes;
      } else {
        store(target, load_strided(source, view.channel_stride, channels));
        k += 1;
      }
    }
  }
}

// Replaces the values of panel p by their scaled deviations, and notes mean, m2 and scale. A
// constant channel has no deviations at all: 2048 equal float32 numbers have an exact sum in
// float64, and float64 numbers are summed about the first one. Where that one lies far off the sum
// errs by many roundings of the mean, so the deviations' own mean, which should be 0, is added.
template <class S, class Operand>
void centre(S* values, int64_t samples, const Stream<Operand>& stream, int64_t p) {
  constexpr int64_t kLanes = Operand::kLanes;
  constexpr int kParts = Wide<S>::kParts;
  constexpr int64_t kPartLanes = kLanes / kParts;
  using V = typename Lanes<S>::vector;

  Wide<S> sum = {};
  V first = load(values);
  first = first - first == V{} ? first : V{};  // infinity and NaN are no origin
  Wide<S> origin = {};
  if constexpr (std::is_same_v<S, double>) origin = to_float64<S>(first);
  V reach = {};  // the largest distance from the origin: at most twice the largest deviation
  for (int64_t k = 0; k < samples; ++k) {
    const V value = load(values + k * kLanes);
    const Wide<S> wide = to_float64<S>(value);
    for (int part = 0; part < kParts; ++part) sum.part[part] += wide.part[part] - origin.part[part];
    const V distance = magnitude(value - first);
    reach = distance > reach ? distance : reach;
  }

  Wide<S> mean, inverse_scale, m2 = {};
  for (int part = 0; part < kParts; ++part) {
    mean.part[part] = origin.part[part] + sum.part[part] / static_cast<double>(samples);
    for (int64_t lane = 0; lane < kPartLanes; ++lane) {
      const double distance = static_cast<double>(reach[part * kPartLanes + lane]);
      // An infinite distance may be that of finite values: less than twice the largest S.
      int exponent = distance > 0 ? std::numeric_limits<S>::max_exponent + 1 : 0;
      if (__builtin_isfinite(distance)) std::frexp(distance, &exponent);
      exponent = static_cast<int>(larger(-1000, smaller(exponent, 1000)));
      stream.scale.data()[p * kLanes + part * kPartLanes + lane] = std::ldexp(1.0, exponent);
      inverse_scale.part[part][lane] = std::ldexp(1.0, -exponent);
    }
  }

  Wide<S> rest = {};
  for (int64_t k = 0; k < samples; ++k) {
    Wide<S> wide = to_float64<S>(load(values + k * kLanes));
    for (int part = 0; part < kParts; ++part) {
      const vdouble deviation = wide.part[part] - mean.part[part];
      m2.part[part] += deviation * deviation;
      if constexpr (std::is_same_v<S, double>) rest.part[part] += deviation;
      wide.part[part] = deviation * inverse_scale.part[part];
    }
    store(values + k * kLanes, from_float64(wide));
  }
  for (int part = 0; part < kParts; ++part) {
    if constexpr (std::is_same_v<S, double>) {
      const vdouble off = rest.part[part] / static_cast<double>(samples);
      mean.part[part] += off - off == vdouble{} ? off : vdouble{};  // of infinity nothing
    }
    store(stream.mean.data() + p * kLanes + part * kPartLanes, mean.part[part]);
    store(stream.m2.data() + p * kLanes + part * kPartLanes, m2.part[part]);
  }
}

// Adds a finished tile to the state. `fraction` is n_a n_b / (n_a + n_b).
template <class Operand>
void merge_tile(const Stream<Operand>& x, const Stream<Operand>& y, bool same, const Region& region,
                double fraction, const double* tile, double* comoment) {
  constexpr int64_t kLanes = Operand::kLanes;
  const int64_t row_begin = region.row_begin * kLanes, column_begin = region.column_begin * kLanes;
  const int64_t row_end = smaller(region.row_end * kLanes, x.channels);
  const int64_t column_end = smaller(region.column_end * kLanes, y.channels);
  for (int64_t i = row_begin; i < row_end; ++i) {
    const double* sums = tile + (i - row_begin) * kTile - column_begin;
    double* target = comoment + i * y.channels;
    const double scale = x.scale.data()[i], delta = x.delta.data()[i];
    for (int64_t j = same ? larger(i, column_begin) : column_begin; j < column_end; ++j) {
      target[j] += sums[j] * (scale * y.scale.data()[j]) + fraction * (delta * y.delta.data()[j]);
    }
  }
}

// Copies what lies above the diagonal of comoment [n, n] below it, in squares that stay in cache.
void mirror(double* comoment, int64_t n, int threads) {
  constexpr int64_t kSquare = 32;
  parallel_for(ceil_div(n, kSquare), threads, [&](int64_t task, int) {
    const int64_t row_end = smaller((task + 1) * kSquare, n);
    for (int64_t column = 0; column < row_end; column += kSquare) {
      for (int64_t i = task * kSquare; i < row_end; ++i) {
        const int64_t column_end = smaller(column + kSquare, i);
        for (int64_t j = column; j < column_end; ++j) comoment[i * n + j] = comoment[j * n + i];
      }
    }
  });
}

// Chan's merge of the block's means and sums of squares into the state's.
template <class Operand>
void merge_channels(const Stream<Operand>& stream, double weight, double fraction, double* mean,
                    double* m2) {
  for (int64_t c = 0; c < stream.channels; ++c) {
    const double delta = stream.delta.data()[c];
    mean[c] += __builtin_isfinite(delta) ? delta * weight : stream.mean.data()[c];
    m2[c] += stream.m2.data()[c] + fraction * (delta * delta);
  }
}

template <class Operand>
void set_delta(const Stream<Operand>& stream, const double* mean) {
  for (int64_t c = 0; c < stream.channels; ++c) {
    stream.delta.data()[c] = stream.mean.data()[c] - mean[c];
  }
}

// Packs and centres one block of a stream. A task takes up to 64 channels: long pieces of a row of
// the tensor, and their 2048 samples (512 KB in float32) stay in the second level cache.
template <class T, class Operand>
struct Loader {
  using S = typename Operand::Scalar;
  static constexpr int64_t kMost = 64 / Operand::kLanes;

  const View3& view;
  const Stream<Operand>& stream;
  int64_t group;

  int64_t tasks() const { return ceil_div(stream.filled, group); }

  void run(int64_t task, const Samples& samples, S* scratch, int64_t stride) const {
    const int64_t begin = task * group, end = smaller(begin + group, stream.filled);
    S* values = stream.operand.room(begin, scratch);
    pack<T>(view, samples, begin, end, values, stride);
    for (int64_t p = begin; p < end; ++p, values += stride) {
      centre(values, samples.count, stream, p);
      stream.operand.keep(p, values, samples.count);
    }
  }
};

template <class T, class Operand>
void add_batch(const View3& x, const View3* y, const Mask2& mask, const CrossMomentsState& state,
               int most_threads) {
  using S = typename Operand::Scalar;
  const bool same = y == nullptr;
  const int64_t products = x.outer * x.inner * x.channels * (same ? x.channels : y->channels);
  const int threads = products < kSerial ? 1 : most_threads;
  const int64_t capacity = smaller(kBlock, x.outer * x.inner);
  Samples samples;
  const Stream<Operand> stream_x(x.channels, capacity, true, same);
  const Stream<Operand> stream_y_or_empty(same ? 0 : y->channels, capacity, false, true);
  const Stream<Operand>& stream_y = same ? stream_x : stream_y_or_empty;

  const int64_t filled = stream_x.filled + stream_y_or_empty.filled;
  const int64_t group = larger(1, smaller(64 / Operand::kLanes, filled / (2 * threads)));
  const Loader<T, Operand> load_x = {x, stream_x, group};
  const Loader<T, Operand> load_y = {same ? x : *y, stream_y_or_empty, group};
  const int64_t stride = room_stride<S>(capacity);
  const int64_t room = Operand::kInPlace ? 0 : group * stride;
  const Scratch<S> rooms(threads * room);

  constexpr int64_t kColumns = kTile / Operand::kLanes;
  const int64_t column_tiles = ceil_div(stream_y.panels, kColumns);
  const int64_t fewest = rows_per_tile<S>(kTile, stream_x.panels, column_tiles, threads);
  const int64_t rows = ceil_div(fewest, Operand::kStep) * Operand::kStep;
  const int64_t row_tiles = ceil_div(stream_x.panels, rows);

  for (int64_t position = 0; position < x.outer * x.inner;) {
    samples.collect(x, mask, position);
    const int64_t count = samples.count;
    if (count == 0) break;

    parallel_for(load_x.tasks() + load_y.tasks(), threads, [&](int64_t task, int thread) {
      S* scratch = rooms.data() + thread * room;
      const int64_t after = task - load_x.tasks();
      if (after < 0) load_x.run(task, samples, scratch, stride);
      if (after >= 0) load_y.run(after, samples, scratch, stride);
    });

    const double before = static_cast<double>(*state.count);
    const double weight = static_cast<double>(count) / (before + static_cast<double>(count));
    const double fraction = before * weight;
    set_delta(stream_x, state.mean_x);
    if (!same) set_delta(stream_y, state.mean_y);
    parallel_for(row_tiles * column_tiles, threads, [&](int64_t task, int) {
      const int64_t row = task / column_tiles * rows;
      const int64_t column = task % column_tiles * kColumns;
      const Region region = {row, smaller(row + rows, stream_x.panels), column,
                             smaller(column + kColumns, stream_y.panels)};
      if (same && region.row_begin >= region.column_end) return;
      alignas(64) double tile[kTile * kTile];
      multiply_region(stream_x.operand, stream_y.operand, same, region, count, tile);
      merge_tile(stream_x, stream_y, same, region, fraction, tile, state.comoment);
    });

    merge_channels(stream_x, weight, fraction, state.mean_x, state.m2_x);
    if (!same) merge_channels(stream_y, weight, fraction, state.mean_y, state.m2_y);
    *state.count += count;
  }
  if (same) {
    for (int64_t c = 0; c < x.channels; ++c) state.comoment[c * x.channels + c] = state.m2_x[c];
    mirror(state.comoment, x.channels, threads);
  }
}

}  // namespace

void cross_moments(const View3& x, const View3* y, const Mask2& mask, Precision precision,
                   const CrossMomentsState& state, int threads) {
  (void)precision;
  with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    using S = typename Lanes<T>::scalar;
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<S, float>) {
      if (precision == Precision::kBFloat16x3) {
        return add_batch<T, Tiles<2>>(x, y, mask, state, threads);
      }
      if (precision == Precision::kBFloat16) {
        return add_batch<T, Tiles<1>>(x, y, mask, state, threads);
      }
    }
#endif
    add_batch<T, Panels<S>>(x, y, mask, state, threads);
  });
}

}  // namespace nlm::NLM_ISA
