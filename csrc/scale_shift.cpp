// y[o, c, i] = x[o, c, i] * scale[t, c] + shift[t, c] with t = task(o), and its gradients.
//
// One read of x and one write of y; the parameters stay in cache. Multiplication and addition round
// separately, in float32 (float64 for float64), as the plain PyTorch expression does: the results
// are the same in every bit.
//
// Rows (core/rows.h) take the parameters as vectors along the columns, with the parameters of a
// channel repeated for each of its columns; other layouts are walked run by run with the parameters
// of one channel in registers, and whole pieces of memory where the runs lie one after the other.
//
// The sums of the backward pass are taken in float64, per block of rows or runs and per task, and
// the blocks are added in order: no atomics, the same bits for any number of threads.
#include "scale_shift.h"

#include <cstring>

#include "core/parallel.h"
#include "core/rows.h"
#include "core/simd.h"
#include "core/stream.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kTaskElements = 32768;  // least work worth handing to a thread
constexpr int64_t kRunLength = 8192;      // longest run in one piece
constexpr int64_t kSumBytes = 4 << 20;    // partial sums of the backward pass, all blocks together

NLM_INLINE int64_t task_of(const Tasks& tasks, int64_t outer) {
  return tasks.ids == nullptr ? 0 : tasks.ids[outer / tasks.outer_per_sample];
}

// parameters[t, c] repeated over the columns of a row: [tasks, width], width rounded up to vectors.
template <class S>
void spread(const void* parameters, const RowPlan& plan, int64_t channels, int64_t tasks,
            int64_t padded, S* columns) {
  for (int64_t t = 0; t < tasks; ++t) {
    const S* source = static_cast<const S*>(parameters) + t * channels;
    plan.for_columns(padded, channels,
                     [&](int64_t j, int64_t c) { columns[t * padded + j] = source[c]; });
  }
}

// Bytes of a result that may be streamed: none of one in place, which the caches hold already.
template <class T>
int64_t bytes_of(const View3& x, const View3& result) {
  if (x.data == result.data) return 0;
  return x.outer * x.channels * x.inner * static_cast<int64_t>(sizeof(T));
}

// body(row, outer, inner, columns) for all rows of a block, the rest row last.
template <class Body>
NLM_INLINE void for_rows(const RowPlan& plan, int64_t first, int64_t last, const Body& body) {
  for (int64_t r = first; r < last; ++r) {
    body(plan.outer_of(r), plan.inner_of(r), r < plan.rows ? plan.width : plan.rest_width());
  }
}

template <class T>
void scale_row(const T* x, T* y, const typename Lanes<T>::scalar* scale,
               const typename Lanes<T>::scalar* shift, int64_t width, bool streamed) {
  int64_t j = 0;
  for (; j + Lanes<T>::count <= width; j += Lanes<T>::count) {
    store(y + j, load(x + j) * load(scale + j) + load(shift + j), streamed);
  }
  if (j < width) {
    store_first(y + j, load_first(x + j, width - j) * load(scale + j) + load(shift + j), width - j);
  }
}

template <class T>
void scale_rows(const View3& x, const View3& y, const void* scale, const void* shift,
                const Tasks& tasks, const RowPlan& plan, int threads) {
  using S = typename Lanes<T>::scalar;
  const int64_t padded = ceil_div(plan.width, Lanes<T>::count) * Lanes<T>::count;
  const Scratch<S> parameters(2 * tasks.count * padded);
  S* scales = parameters.data();
  S* shifts = scales + tasks.count * padded;
  spread(scale, plan, x.channels, tasks.count, padded, scales);
  spread(shift, plan, x.channels, tasks.count, padded, shifts);

  const int64_t rows = plan.rows + (plan.rest > 0);
  const int64_t block_rows = larger(1, kTaskElements / plan.width);
  const int64_t bytes = bytes_of<T>(x, y);
  parallel_for(ceil_div(rows, block_rows), threads, [&](int64_t block, int) {
    const int64_t first = block * block_rows;
    for_rows(plan, first, smaller(first + block_rows, rows),
             [&](int64_t o, int64_t i, int64_t width) {
               const int64_t offset = task_of(tasks, o) * padded;
               T* target = y.at<T>(o, 0, i);
               scale_row(x.at<T>(o, 0, i), target, scales + offset, shifts + offset, width,
                         streams(target, bytes, Lanes<T>::count));
             });
    end_stream(bytes >= kStreamedBytes);
  });
}

template <class T>
void scale_run(const T* x, int64_t x_stride, T* y, int64_t y_stride,
               typename Lanes<T>::scalar scale, typename Lanes<T>::scalar shift, int64_t length,
               int64_t bytes) {
  const auto a = broadcast(scale);
  const auto b = broadcast(shift);
  int64_t i = 0;
  if (x_stride == 1 && y_stride == 1) {
    const bool streamed = streams(y, bytes, Lanes<T>::count);
    for (; i + Lanes<T>::count <= length; i += Lanes<T>::count) {
      store(y + i, load(x + i) * a + b, streamed);
    }
  }
  for (; i < length; i += Lanes<T>::count) {
    const int64_t count = smaller(Lanes<T>::count, length - i);
    store_strided(y + i * y_stride, y_stride,
                  load_strided(x + i * x_stride, x_stride, count) * a + b, count);
  }
}

template <class T>
void scale_runs(const View3& x, const View3& y, const void* scale, const void* shift,
                const Tasks& tasks, int threads) {
  using S = typename Lanes<T>::scalar;
  const int64_t run = smaller(x.inner, kRunLength);
  const int64_t pieces = ceil_div(x.inner, run);
  const int64_t runs = x.outer * x.channels * pieces;
  const int64_t block_runs = larger(1, kTaskElements / run);
  const int64_t bytes = bytes_of<T>(x, y);
  parallel_for(ceil_div(runs, block_runs), threads, [&](int64_t block, int) {
    const int64_t last = smaller((block + 1) * block_runs, runs);
    for (int64_t r = block * block_runs; r < last; ++r) {
      const int64_t i = r % pieces * run;
      const int64_t c = r / pieces % x.channels;
      const int64_t o = r / pieces / x.channels;
      const int64_t parameter = task_of(tasks, o) * x.channels + c;
      scale_run(x.at<T>(o, c, i), x.inner_stride, y.at<T>(o, c, i), y.inner_stride,
                static_cast<const S*>(scale)[parameter], static_cast<const S*>(shift)[parameter],
                smaller(run, x.inner - i), bytes);
    }
    end_stream(bytes >= kStreamedBytes);
  });
}

// Whether every outer index is one piece of memory, its channels one after the other.
bool has_packed_channels(const View3& view) {
  return (view.inner_stride == 1 || view.inner == 1) &&
         (view.channel_stride == view.inner || view.channels == 1);
}

// Pieces of memory, one for each outer index or one in all, by vectors that lie at multiples of
// their size from its beginning, whatever the length of a run: the one that two runs share takes
// the parameters of each in its lanes. Runs are no shorter than a vector.
template <class T>
void scale_packed(const View3& x, const View3& y, const void* scale, const void* shift,
                  const Tasks& tasks, int threads) {
  using S = typename Lanes<T>::scalar;
  constexpr int kLanes = Lanes<T>::count;
  const int64_t piece = x.channels * x.inner;
  const bool whole = x.outer == 1 || (x.outer_stride == piece && y.outer_stride == piece);
  const int64_t size = whole ? x.outer * piece : piece;
  const int64_t parts = ceil_div(size, kTaskElements);
  const int64_t bytes = bytes_of<T>(x, y);
  parallel_for((whole ? 1 : x.outer) * parts, threads, [&](int64_t task, int) {
    const int64_t outer = task / parts;
    const T* source = x.at<T>(outer, 0, 0);
    T* target = y.at<T>(outer, 0, 0);
    const bool streamed = streams(target, bytes, kLanes);
    int64_t i = task % parts * kTaskElements;
    int64_t run = i / x.inner;
    const auto parameter = [&] {  // of the run; behind the last one it is not used
      const int64_t o = smaller(outer + run / x.channels, x.outer - 1);
      return task_of(tasks, o) * x.channels + run % x.channels;
    };
    const auto read = [&](const void* parameters, int64_t at) {
      return broadcast(static_cast<const S*>(parameters)[at]);
    };
    auto a = read(scale, parameter()), b = read(shift, parameter());
    const int64_t last = smaller(i + kTaskElements, size);
    while (i < last) {
      const int64_t end = smaller(++run * x.inner, last);
      for (; i + kLanes <= end; i += kLanes) store(target + i, load(source + i) * a + b, streamed);
      const int64_t next = parameter();
      const auto next_a = read(scale, next), next_b = read(shift, next);
      if (i < end && end < last) {
        const auto own = first_lanes<T>(end - i);
        store(target + i, load(source + i) * (own ? a : next_a) + (own ? b : next_b), streamed);
        i += kLanes;
      } else if (i < end) {
        store_first(target + i, load_first(source + i, end - i) * a + b, end - i);
        i = end;
      }
      a = next_a;
      b = next_b;
    }
    end_stream(bytes >= kStreamedBytes);
  });
}

// Blocks of the backward pass: `items` in at most `count` blocks, whose sums fit kSumBytes.
struct Blocks {
  int64_t count, size;
};
Blocks cut(int64_t items, int64_t item_elements, int64_t sums_per_block) {
  const int64_t bytes = sums_per_block * static_cast<int64_t>(sizeof(double));
  const int64_t most = larger(1, smaller(256, kSumBytes / larger(1, bytes)));
  const int64_t size =
      larger(ceil_div(kTaskElements, larger(1, item_elements)), ceil_div(items, most));
  return {ceil_div(items, size), size};
}

// products += grad * x and grads += grad for one vector, in float64.
template <class T>
NLM_INLINE void add_products(typename Lanes<T>::vector grad, typename Lanes<T>::vector x,
                             vdouble* products, vdouble* grads) {
  const Wide<T> g = to_float64<T>(grad);
  const Wide<T> v = to_float64<T>(x);
  for (int p = 0; p < Wide<T>::kParts; ++p) {
    products[p] += g.part[p] * v.part[p];
    grads[p] += g.part[p];
  }
}

template <class T>
void backward_row(const T* grad, const T* x, T* grad_x, const typename Lanes<T>::scalar* scale,
                  int64_t width, bool streamed, double* products, double* grads) {
  constexpr int kParts = Wide<T>::kParts;
  for (int64_t j = 0; j < width; j += Lanes<T>::count) {
    const int64_t left = width - j;
    const bool full = left >= Lanes<T>::count;
    const auto g = full ? load(grad + j) : load_first(grad + j, left);
    const auto v = full ? load(x + j) : load_first(x + j, left);
    const auto result = g * load(scale + j);
    full ? store(grad_x + j, result, streamed) : store_first(grad_x + j, result, left);
    vdouble product[kParts], sum[kParts];
    std::memcpy(product, products + j, sizeof product);
    std::memcpy(sum, grads + j, sizeof sum);
    add_products<T>(g, v, product, sum);
    std::memcpy(products + j, product, sizeof product);
    std::memcpy(grads + j, sum, sizeof sum);
  }
}

template <class T>
void backward_rows(const View3& grad, const View3& x, const View3& grad_x, const void* scale,
                   const Tasks& tasks, const RowPlan& plan, double* grad_scale, double* grad_shift,
                   int threads) {
  using S = typename Lanes<T>::scalar;
  const int64_t padded = ceil_div(plan.width, Lanes<T>::count) * Lanes<T>::count;
  const Scratch<S> scales(tasks.count * padded);
  spread(scale, plan, x.channels, tasks.count, padded, scales.data());

  const int64_t rows = plan.rows + (plan.rest > 0);
  const int64_t sums = 2 * tasks.count * padded;  // per block: [products, grads][task][column]
  const int64_t bytes = bytes_of<T>(x, grad_x);
  const Blocks blocks = cut(rows, plan.width, sums);
  const Scratch<double> partials(blocks.count * sums);
  parallel_for(blocks.count, threads, [&](int64_t block, int) {
    double* products = partials.data() + block * sums;
    double* grads = products + sums / 2;
    std::memset(products, 0, sums * sizeof(double));
    const int64_t first = block * blocks.size;
    for_rows(
        plan, first, smaller(first + blocks.size, rows), [&](int64_t o, int64_t i, int64_t width) {
          const int64_t offset = task_of(tasks, o) * padded;
          T* target = grad_x.at<T>(o, 0, i);
          backward_row(grad.at<T>(o, 0, i), x.at<T>(o, 0, i), target, scales.data() + offset, width,
                       streams(target, bytes, Lanes<T>::count), products + offset, grads + offset);
        });
    end_stream(bytes >= kStreamedBytes);
  });
  double* products = partials.data();
  const double* grads = products + sums / 2;
  for (int64_t block = 1; block < blocks.count; ++block) {
    for (int64_t j = 0; j < sums; ++j) products[j] += products[block * sums + j];
  }
  for (int64_t t = 0; t < tasks.count; ++t) {
    plan.for_columns(plan.width, x.channels, [&](int64_t j, int64_t c) {
      grad_scale[t * x.channels + c] += products[t * padded + j];
      grad_shift[t * x.channels + c] += grads[t * padded + j];
    });
  }
}

template <class T>
void backward_runs(const View3& grad, const View3& x, const View3& grad_x, const void* scale,
                   const Tasks& tasks, double* grad_scale, double* grad_shift, int threads) {
  using S = typename Lanes<T>::scalar;
  constexpr int kParts = Wide<T>::kParts;
  const int64_t run = smaller(x.inner, kRunLength);
  const int64_t pieces = ceil_div(x.inner, run);
  const int64_t runs = x.outer * x.channels * pieces;
  const int64_t sums = 2 * tasks.count * x.channels;
  const int64_t bytes = bytes_of<T>(x, grad_x);
  const Blocks blocks = cut(runs, run, sums);
  const Scratch<double> partials(blocks.count * sums);
  parallel_for(blocks.count, threads, [&](int64_t block, int) {
    double* products = partials.data() + block * sums;
    double* grads = products + sums / 2;
    std::memset(products, 0, sums * sizeof(double));
    const int64_t last = smaller((block + 1) * blocks.size, runs);
    for (int64_t r = block * blocks.size; r < last; ++r) {
      const int64_t first = r % pieces * run;
      const int64_t c = r / pieces % x.channels;
      const int64_t o = r / pieces / x.channels;
      const int64_t length = smaller(run, x.inner - first);
      const int64_t parameter = task_of(tasks, o) * x.channels + c;
      const auto a = broadcast(static_cast<const S*>(scale)[parameter]);
      const T* grad_run = grad.at<T>(o, c, first);
      const T* x_run = x.at<T>(o, c, first);
      T* out_run = grad_x.at<T>(o, c, first);
      const bool streamed = grad_x.inner_stride == 1 && streams(out_run, bytes, Lanes<T>::count);
      vdouble product[kParts] = {}, sum[kParts] = {};
      for (int64_t i = 0; i < length; i += Lanes<T>::count) {
        const int64_t count = smaller(Lanes<T>::count, length - i);
        const auto g = load_strided(grad_run + i * grad.inner_stride, grad.inner_stride, count);
        const auto v = load_strided(x_run + i * x.inner_stride, x.inner_stride, count);
        if (streamed && count == Lanes<T>::count) {
          store(out_run + i, g * a, true);
        } else {
          store_strided(out_run + i * grad_x.inner_stride, grad_x.inner_stride, g * a, count);
        }
        add_products<T>(g, v, product, sum);
      }
      for (int p = 0; p < kParts; ++p) {
        products[parameter] += sum_lanes(product[p]);
        grads[parameter] += sum_lanes(sum[p]);
      }
    }
    end_stream(bytes >= kStreamedBytes);
  });
  for (int64_t block = 0; block < blocks.count; ++block) {
    const double* products = partials.data() + block * sums;
    for (int64_t j = 0; j < sums / 2; ++j) {
      grad_scale[j] += products[j];
      grad_shift[j] += products[sums / 2 + j];
    }
  }
}

}  // namespace

void scale_shift(const View3& x, const View3& y, const void* scale, const void* shift,
                 const Tasks& tasks, int threads) {
  if (x.empty()) return;
  const bool one_task = tasks.ids == nullptr;
  if (one_task && x.channels == 1 && x.inner == 1 && x.outer > 1) {
    return scale_shift(as_run(x), as_run(y), scale, shift, tasks, threads);
  }
  const View3* views[] = {&x, &y};
  const RowPlan plan = plan_rows(views, 2, true, one_task);
  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    if (plan.rows > 0) {
      scale_rows<T>(x, y, scale, shift, tasks, plan, threads);
    } else if (x.inner >= Lanes<T>::count && has_packed_channels(x) && has_packed_channels(y)) {
      scale_packed<T>(x, y, scale, shift, tasks, threads);
    } else {
      scale_runs<T>(x, y, scale, shift, tasks, threads);
    }
  });
}

void scale_shift_backward(const View3& grad, const View3& x, const View3& grad_x, const void* scale,
                          const Tasks& tasks, double* grad_scale, double* grad_shift, int threads) {
  for (int64_t j = 0; j < tasks.count * x.channels; ++j) grad_scale[j] = grad_shift[j] = 0;
  if (x.empty()) return;
  const View3* views[] = {&grad, &x, &grad_x};
  const RowPlan plan = plan_rows(views, 3, true, tasks.ids == nullptr);
  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    if (plan.rows > 0) {
      backward_rows<T>(grad, x, grad_x, scale, tasks, plan, grad_scale, grad_shift, threads);
    } else {
      backward_runs<T>(grad, x, grad_x, scale, tasks, grad_scale, grad_shift, threads);
    }
  });
}

}  // namespace nlm::NLM_ISA
