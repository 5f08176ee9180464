// The CUDA kernels' work on one (block, thread); tests run the same code over the grid on the CPU.
//
// A row is one position of all axes but the last. Its threads compute the row's source offset once
// (through the indices of the leading axes and of their parents), then copy or gather columns:
// neighbouring threads write neighbouring elements, and a gather stays within one source row, which
// the first-level cache holds.
#pragma once

#include <cstdint>

#include "core/device.h"
#include "permute_plan.h"

namespace nlm::NLM_ISA {

struct alignas(16) Word16 {
  uint64_t half[2];
};

// What a kernel gets by value (2.9 KB).
struct PermuteGrid {
  Plan plan;
  RowGrid grid;
  int64_t below[kPermuteMaxAxes + 1];  // rows per step of a leading axis
};

inline PermuteGrid make_permute_grid(const Plan& plan) {
  PermuteGrid result = {plan, {}, {}};
  int64_t rows = 1;
  for (int a = plan.count - 2; a >= 0; --a) {
    result.below[a] = rows;
    rows *= plan.axes[a].size;
  }
  result.grid = RowGrid::make(rows, plan.axes[plan.count - 1].size);
  return result;
}

// Where the last axis is copied in runs, the largest power of two of bytes, up to 16, that divides
// runs, strides and addresses: the plan then counts in such words.
inline int widen_words(Plan& plan, int element_bytes) {
  const PlanAxis& last = plan.axes[plan.count - 1];
  if (last.index != nullptr || last.stride != 1) return element_bytes;
  uint64_t common = reinterpret_cast<uintptr_t>(plan.source) |
                    reinterpret_cast<uintptr_t>(plan.target) | 16 |
                    static_cast<uint64_t>(last.size * element_bytes);
  for (int a = 0; a + 1 < plan.count; ++a) {
    common |= static_cast<uint64_t>(plan.axes[a].stride * element_bytes);
  }
  const int word = static_cast<int>(common & (~common + 1));
  if (word <= element_bytes) return element_bytes;
  const int ratio = word / element_bytes;
  for (int a = 0; a + 1 < plan.count; ++a) plan.axes[a].stride /= ratio;
  plan.axes[plan.count - 1].size /= ratio;
  plan.elements /= ratio;
  return word;
}

NLM_DEVICE int64_t axis_position(const PermuteGrid& work, int a, int64_t row) {
  return remainder(quotient(row, work.below[a]), work.plan.axes[a].size);
}

// Where the index row of axis `a` begins. The last axis is nobody's parent.
NLM_DEVICE int64_t index_begin(const PermuteGrid& work, int a, int64_t row) {
  const PlanAxis& axis = work.plan.axes[a];
  int64_t begin = 0;
  if (axis.has_parents) {
    for (int p = 0; p + 1 < work.plan.count; ++p) {
      const int64_t step = axis.parent_stride[p];
      if (step != 0) begin += step * axis_position(work, p, row);
    }
  }
  return begin;
}

// write(target element, source element) for every element of the thread.
template <class T, class Memory, class Write>
NLM_DEVICE void permute_body(const PermuteGrid& work, int64_t block, int thread,
                             const Memory& memory, const Write& write) {
  const int64_t row = work.grid.row(block, thread);
  if (row >= work.grid.rows) return;
  const int last = work.plan.count - 1;
  int64_t offset = 0;
  for (int a = 0; a < last; ++a) {
    const PlanAxis& axis = work.plan.axes[a];
    int64_t position = axis_position(work, a, row);
    if (axis.index != nullptr) position = memory.index(a)[index_begin(work, a, row) + position];
    offset += position * axis.stride;
  }
  const auto source = memory.template source<T>();
  const auto target = memory.template target<T>();
  const int64_t target_row = row * work.grid.columns;
  const int64_t stride = work.plan.axes[last].stride;
  const int64_t end = work.grid.end_column(block);
  int64_t column = work.grid.first_column(block, thread);
  if (work.plan.axes[last].index == nullptr) {
    for (; column < end; column += work.grid.lanes) {
      write(target[target_row + column], source[offset + column * stride]);
    }
  } else {
    const auto index = memory.index(last);
    const int64_t begin = index_begin(work, last, row);
    for (; column < end; column += work.grid.lanes) {
      write(target[target_row + column], source[offset + index[begin + column] * stride]);
    }
  }
}

template <class T>
struct WriteCopy {
  NLM_DEVICE void operator()(T& target, const T& source) const { target = source; }
};

// Rounds after the product and after the sum, as the reference does.
template <class T, class Compute>
struct WriteSum {
  Compute weight;
  NLM_DEVICE void operator()(T& target, const T& source) const {
    narrow(widen(target) + widen(source) * weight, target);
  }
};

}  // namespace nlm::NLM_ISA
