// Gathers axes of a list of tensors: target[i] = source[j], j_a = index_a[i_parents(a), i_a].
//
// All tensors of a call are cut into ranges of 256 KB of output, and the threads share these.
// Within a range the output is written in order, a row (the last axis) at a time; the source offset
// of a row is the sum of its axes' terms, of which only those that change with the innermost outer
// axis are added anew for each row. A row is then a memcpy, a strided copy or a gather from within
// one source row; rows of 2 and 4 byte elements that share their index are gathered together
// (core/gather.h).
#include "permute.h"

#include <cstring>

#include "core/gather.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/stream.h"
#include "permute_plan.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;
constexpr int64_t kMostOffsets = 8192;  // 64 KB: half of the smallest second-level caches
constexpr int64_t kShortRun = 32;       // elements below which a memcpy costs more than a gather
constexpr int64_t kStreamedRun = 1024;  // bytes below which a run is not worth streaming
constexpr int64_t kShortGather = 256;   // elements below which a row costs more than its gather
constexpr int64_t kRowsPerOffset = 32;  // uses that pay for computing an offset

// Elements whose bytes alone matter.
struct Bytes16 {
  uint64_t half[2];
};

// target[i] = source[...] along a row.
template <class T>
struct Assign {
  using Element = T;
  static constexpr int kRowsTogether = sizeof(T) == 2 ? 2 : sizeof(T) == 4 ? 1 : 0;
  int64_t bytes;  // of the whole target

  // kRowsTogether whole rows, n apart in the target, read at the given offsets.
  NLM_INLINE void together(T* target, const T* source, const int64_t* offsets, int64_t n,
                           const RowGather& by) const {
    if constexpr (kRowsTogether == 1) {
      gather_words(target, source + offsets[0], by.index, n,
                   streams(target, bytes, kVectorBytes / 4));
    } else if constexpr (kRowsTogether == 2) {
      join_pairs(by.pairs, source + offsets[0], source + offsets[1], by.extent);
      gather_pairs(target, target + n, by.pairs, by.index, n);
    }
  }

  NLM_INLINE void contiguous(T* target, const T* source, int64_t n) const {
    const int64_t size = n * static_cast<int64_t>(sizeof(T));
    if (bytes >= kStreamedBytes && size >= kStreamedRun) {
      stream_copy(target, source, size);
    } else {
      std::memcpy(target, source, static_cast<size_t>(size));
    }
  }
  NLM_INLINE void strided(T* target, const T* source, int64_t stride, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) target[i] = source[i * stride];
  }
  NLM_INLINE void gathered(T* target, const T* source, int64_t stride, const int64_t* index,
                           int64_t n) const {
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) target[i] = source[index[i]];
    } else {
      for (int64_t i = 0; i < n; ++i) target[i] = source[index[i] * stride];
    }
  }
};

// target[i] += weight * source[...] along a row.
template <class T>
struct Accumulate {
  using Element = T;
  static constexpr int kRowsTogether = 0;
  static constexpr int64_t kLanes = Lanes<T>::count;
  typename Lanes<T>::scalar weight;

  NLM_INLINE void add(T* target, const T* source, int64_t n) const {
    if (n == kLanes) {
      store(target, load(target) + load(source) * weight);
    } else {
      store_first(target, load_first(target, n) + load_first(source, n) * weight, n);
    }
  }
  NLM_INLINE void contiguous(T* target, const T* source, int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes) add(target + i, source + i, smaller(kLanes, n - i));
  }
  NLM_INLINE void strided(T* target, const T* source, int64_t stride, int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t lanes = smaller(kLanes, n - i);
      T block[kLanes];
      for (int64_t lane = 0; lane < lanes; ++lane) block[lane] = source[(i + lane) * stride];
      add(target + i, block, lanes);
    }
  }
  NLM_INLINE void gathered(T* target, const T* source, int64_t stride, const int64_t* index,
                           int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t lanes = smaller(kLanes, n - i);
      T block[kLanes];
      for (int64_t lane = 0; lane < lanes; ++lane) block[lane] = source[index[i + lane] * stride];
      add(target + i, block, lanes);
    }
  }
};

// What the axes up to `middle` that change with it add to the source offset in its row r.
NLM_INLINE int64_t row_offset(const Plan& plan, int64_t* position, int middle, int64_t r) {
  if (middle < 0) return 0;
  position[middle] = r;
  int64_t offset = 0;
  for (int a = 0; a <= middle; ++a) {
    if (plan.changes_with(a, middle)) offset += plan.term(a, position);
  }
  return offset;
}

// Writes whole rows, from row r of the middle axis on, for as long as they share their index;
// returns how many.
template <class Row>
int64_t gather_rows(const Plan& plan, int64_t* position, int64_t r, int64_t rows,
                    const typename Row::Element* source, typename Row::Element* target,
                    const Row& row, RowGather& by) {
  constexpr int kTogether = Row::kRowsTogether;
  if constexpr (kTogether == 0) {
    return 0;
  } else {
    const int last = plan.count - 1;
    const int64_t n = plan.axes[last].size;
    if (rows < kTogether || plan.axes[last].stride != 1 || plan.changes_with(last, last - 1) ||
        !by.prepare(plan.index_row(last, position), n)) {
      return 0;
    }
    int64_t now[kTogether], next[kTogether];
    for (int k = 0; k < kTogether; ++k) now[k] = row_offset(plan, position, last - 1, r + k);
    int64_t done = 0;
    for (; done + kTogether <= rows; done += kTogether) {
      const bool more = done + 2 * kTogether <= rows;
      for (int k = 0; k < kTogether && more; ++k) {
        next[k] = row_offset(plan, position, last - 1, r + done + kTogether + k);
        prefetch(source + next[k], by.extent);
      }
      row.together(target + done * n, source, now, n, by);
      for (int k = 0; k < kTogether && more; ++k) now[k] = next[k];
    }
    return done;
  }
}

// Writes the output elements [begin, end) of a plan.
template <class Row>
void permute_range(const Plan& plan, int64_t begin, int64_t end, const Row& row, RowGather by) {
  using T = typename Row::Element;
  const T* source = static_cast<const T*>(plan.source);
  T* target = static_cast<T*>(plan.target);
  const int last = plan.count - 1;
  const int middle = last - 1;  // the axis that steps from row to row; -1 when there is one row
  const PlanAxis& along = plan.axes[last];

  int64_t position[kPermuteMaxAxes + 1];
  int64_t rest = begin;
  for (int a = last; a >= 0; --a) {
    position[a] = rest % plan.axes[a].size;
    rest /= plan.axes[a].size;
  }
  while (begin < end) {
    int64_t slab = 0;
    for (int a = 0; a < middle; ++a) {
      if (!plan.changes_with(a, middle)) slab += plan.term(a, position);
    }
    const int64_t rows = middle < 0 ? 1 : plan.axes[middle].size;
    for (int64_t r = middle < 0 ? 0 : position[middle]; r < rows && begin < end;) {
      const int64_t column = position[last];
      if (along.index != nullptr && column == 0 && middle >= 0) {
        const int64_t whole = smaller(rows - r, (end - begin) / along.size);
        const int64_t done =
            gather_rows(plan, position, r, whole, source + slab, target + begin, row, by);
        r += done;
        begin += done * along.size;
        if (done > 0) continue;
      }
      const int64_t offset = slab + row_offset(plan, position, middle, r);
      const int64_t n = smaller(along.size - column, end - begin);
      if (along.index != nullptr) {
        row.gathered(target + begin, source + offset, along.stride,
                     plan.index_row(last, position) + column, n);
      } else if (along.stride == 1) {
        row.contiguous(target + begin, source + offset + column, n);
      } else {
        row.strided(target + begin, source + offset + column * along.stride, along.stride, n);
      }
      position[last] = 0;
      begin += n;
      ++r;
    }
    for (int a = middle; a >= 0; --a) {
      position[a] = a == middle ? 0 : position[a] + 1;
      if (a < middle) {
        if (position[a] < plan.axes[a].size) break;
        position[a] = 0;
      }
    }
  }
}

// The first of the trailing axes that are better taken as one gathered row, whose index is the
// source offset of each of its elements; the last axis, when none are.
int collapsible_axes(const Plan& plan) {
  const int last = plan.count - 1;
  const PlanAxis& along = plan.axes[last];
  if (along.size >= (along.index != nullptr ? kShortGather : kShortRun)) return last;
  int64_t size = along.size;
  int best = last;
  for (int first = last - 1; first >= 0; --first) {
    size *= plan.axes[first].size;
    if (size > kMostOffsets || size * kRowsPerOffset > plan.elements) break;
    bool closed = true;  // no parent crosses the border
    for (int a = 0; a <= last; ++a) {
      for (int p = 0; p <= last; ++p) {
        const bool crosses = (a < first) != (p < first);
        if (crosses && plan.axes[a].parent_stride[p] != 0) closed = false;
      }
    }
    if (closed) best = first;
  }
  return best;
}

int64_t axes_size(const Plan& plan, int first) {
  int64_t size = 1;
  for (int a = first; a < plan.count; ++a) size *= plan.axes[a].size;
  return size;
}

void collapse(Plan& plan, int first, int64_t* offsets) {
  const int64_t size = axes_size(plan, first);
  int64_t position[kPermuteMaxAxes + 1] = {};
  for (int64_t i = 0; i < size; ++i) {
    offsets[i] = 0;
    for (int a = first; a < plan.count; ++a) offsets[i] += plan.term(a, position);
    for (int a = plan.count - 1; a >= first && ++position[a] == plan.axes[a].size; --a) {
      position[a] = 0;
    }
  }
  plan.axes[first] = {size, 1, offsets, false, {}};
  plan.count = first + 1;
}

// The elements of a range: about kTaskBytes, of whole pairs of rows where these are shorter.
int64_t range_step(const Plan& plan, int64_t element_bytes) {
  const int64_t step = kTaskBytes / element_bytes;
  const int64_t two_rows = 2 * plan.axes[plan.count - 1].size;
  return two_rows > 0 && two_rows <= step ? step / two_rows * two_rows : step;
}

// run(item, plan, begin, end, scratch) over ranges of all items' outputs.
template <class ElementBytes, class Run>
void for_all_ranges(const PermuteItem* items, int64_t count, int threads,
                    const ElementBytes& element_bytes, const Run& run) {
  const Scratch<Plan> plans(count);
  const Scratch<int> first_axis(count);
  const Scratch<int64_t> first_task(count + 1);
  int64_t offset_count = 0;
  for (int64_t t = 0; t < count; ++t) {
    Plan& plan = plans.data()[t];
    make_plan(items[t], plan);
    first_axis.data()[t] = collapsible_axes(plan);
    if (first_axis.data()[t] < plan.count - 1) {
      offset_count += axes_size(plan, first_axis.data()[t]);
    }
  }
  const Scratch<int64_t> offsets(offset_count);
  int64_t* next_offsets = offsets.data();
  first_task.data()[0] = 0;
  for (int64_t t = 0; t < count; ++t) {
    Plan& plan = plans.data()[t];
    if (first_axis.data()[t] < plan.count - 1) {
      collapse(plan, first_axis.data()[t], next_offsets);
      next_offsets += plan.axes[plan.count - 1].size;
    }
    first_task.data()[t + 1] =
        first_task.data()[t] + ceil_div(plan.elements, range_step(plan, element_bytes(t)));
  }
  const Scratch<char> rows(threads * RowGather::kBytes);
  parallel_for(first_task.data()[count], threads, [&](int64_t task, int thread) {
    int64_t item = 0;
    for (int64_t above = count; above - item > 1;) {
      const int64_t half = (item + above) / 2;
      (first_task.data()[half] <= task ? item : above) = half;
    }
    const Plan& plan = plans.data()[item];
    const int64_t step = range_step(plan, element_bytes(item));
    const int64_t begin = (task - first_task.data()[item]) * step;
    run(item, plan, begin, smaller(begin + step, plan.elements),
        RowGather(rows.data() + thread * RowGather::kBytes));
  });
}

int bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace

void permute(const PermuteItem* items, const int* element_bytes, int64_t count, int threads) {
  for_all_ranges(
      items, count, threads, [&](int64_t item) { return element_bytes[item]; },
      [&](int64_t item, const Plan& plan, int64_t begin, int64_t end, RowGather by) {
        const int64_t bytes = plan.elements * element_bytes[item];
        switch (element_bytes[item]) {
          case 1:
            permute_range(plan, begin, end, Assign<uint8_t>{bytes}, by);
            break;
          case 2:
            permute_range(plan, begin, end, Assign<uint16_t>{bytes}, by);
            break;
          case 4:
            permute_range(plan, begin, end, Assign<uint32_t>{bytes}, by);
            break;
          case 8:
            permute_range(plan, begin, end, Assign<uint64_t>{bytes}, by);
            break;
          case 16:
            permute_range(plan, begin, end, Assign<Bytes16>{bytes}, by);
            break;
        }
        end_stream(bytes >= kStreamedBytes);
      });
}

void permute_add(const PermuteItem* items, const DType* dtypes, const double* weights,
                 int64_t count, int threads) {
  for_all_ranges(
      items, count, threads, [&](int64_t item) { return bytes_of(dtypes[item]); },
      [&](int64_t item, const Plan& plan, int64_t begin, int64_t end, RowGather by) {
        with_dtype(dtypes[item], [&](auto element) {
          using T = decltype(element);
          using S = typename Lanes<T>::scalar;
          permute_range(plan, begin, end, Accumulate<T>{static_cast<S>(weights[item])}, by);
        });
      });
}

}  // namespace nlm::NLM_ISA
