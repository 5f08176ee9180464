// How a gathered tensor is walked, by the CPU kernel and by the CUDA kernel.
//
// Axes that are neither gathered nor a parent, and adjoin in the source, are first merged into one,
// so that `[out, in, 3, 3]` with both channels permuted copies runs of nine.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "permute.h"

namespace nlm::NLM_ISA {

struct PlanAxis {
  int64_t size;
  int64_t stride;
  const int64_t* index;
  bool has_parents;
  // Steps of `index` per step of each axis; 0 where that is no parent.
  int64_t parent_stride[kPermuteMaxAxes + 1];
};

// A tensor with merged axes: at least one; no axis has the last one as its parent.
struct Plan {
  const void* source;
  void* target;
  int count;
  int64_t elements;
  PlanAxis axes[kPermuteMaxAxes + 1];

  // What axis `a` adds to the source offset at an output position.
  NLM_INLINE int64_t term(int a, const int64_t* position) const {
    const PlanAxis& axis = axes[a];
    if (axis.index == nullptr) return position[a] * axis.stride;
    return index_row(a, position)[position[a]] * axis.stride;
  }

  NLM_INLINE const int64_t* index_row(int a, const int64_t* position) const {
    const PlanAxis& axis = axes[a];
    int64_t offset = 0;
    if (axis.has_parents) {
      for (int p = 0; p < count; ++p) offset += axis.parent_stride[p] * position[p];
    }
    return axis.index + offset;
  }

  NLM_INLINE bool changes_with(int a, int other) const {
    return a == other || axes[a].parent_stride[other] != 0;
  }
};

inline void make_plan(const PermuteItem& item, Plan& plan) {
  bool is_parent[kPermuteMaxAxes] = {};
  for (int a = 0; a < item.axis_count; ++a) {
    for (int p = 0; p < item.axes[a].parent_count; ++p) is_parent[item.axes[a].parents[p]] = true;
  }
  plan.source = item.source;
  plan.target = item.target;
  plan.count = 0;
  plan.elements = 1;
  int place[kPermuteMaxAxes];  // of an item's axis in the plan
  bool last_is_plain = false;
  bool last_is_parent = false;
  for (int a = 0; a < item.axis_count; ++a) {
    const PermuteAxis& axis = item.axes[a];
    const bool is_plain = axis.index == nullptr && !is_parent[a];
    plan.elements *= axis.size;
    if (is_plain && axis.size == 1) continue;
    if (is_plain && last_is_plain && plan.axes[plan.count - 1].stride == axis.stride * axis.size) {
      plan.axes[plan.count - 1].size *= axis.size;
      plan.axes[plan.count - 1].stride = axis.stride;
    } else {
      plan.axes[plan.count++] = {axis.size, axis.stride, axis.index, axis.parent_count > 0, {}};
    }
    place[a] = plan.count - 1;
    last_is_plain = is_plain;
    last_is_parent = is_parent[a];
  }
  if (plan.count == 0 || last_is_parent) plan.axes[plan.count++] = {1, 1, nullptr, false, {}};
  for (int a = 0; a < item.axis_count; ++a) {
    const PermuteAxis& axis = item.axes[a];
    int64_t step = axis.size;
    for (int p = axis.parent_count - 1; p >= 0; --p) {
      plan.axes[place[a]].parent_stride[place[axis.parents[p]]] = step;
      step *= item.axes[axis.parents[p]].size;
    }
  }
}

}  // namespace nlm::NLM_ISA
