// Reading x[outer, channel, inner] as rows of contiguous columns, where its layout allows it.
//
// Three layouts do: [N, C]; [N, L, C], whose channels are contiguous; and packed [N, C, L] with a
// short L, where a row holds all channels and positions of one outer index. Narrow packed rows can
// be joined, so that vectors are filled even by C = 3. In all cases column j belongs to channel (j
// / run) % channels.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "view.h"

namespace nlm::NLM_ISA {

struct RowPlan {
  int64_t rows;    // 0: not readable as rows
  int64_t inner;   // row r starts at x[r / inner, 0, r % inner], times `joined` outer indices
  int64_t joined;  // rows of x in one row
  int64_t width;   // columns of a row
  int64_t rest;    // rows of x, from outer index rows * joined on, left over by joining
  int64_t run;     // neighbouring columns of one channel

  int64_t rest_width() const { return width / joined * rest; }
  NLM_INLINE int64_t outer_of(int64_t row) const { return row / inner * joined; }
  NLM_INLINE int64_t inner_of(int64_t row) const { return row % inner; }
  // body(column, channel) for the first columns of a row: without a division for each of them.
  template <class Body>
  NLM_INLINE void for_columns(int64_t columns, int64_t channels, const Body& body) const {
    for (int64_t j = 0, c = 0, next = run; j < columns; ++j) {
      if (j == next) {
        next += run;
        c = c + 1 < channels ? c + 1 : 0;
      }
      body(j, c);
    }
  }
};

// A plan that holds for all views, which have one shape. `whole` allows rows over several
// positions, `join` rows over several outer indices: not where a mask or a task id tells these
// apart.
inline RowPlan plan_rows(const View3* const* views, int count, bool whole, bool join) {
  constexpr int64_t kShortInner = 64;  // longer runs fill their vectors themselves
  constexpr int64_t kWideRow = 256;    // narrower rows are joined ...
  constexpr int64_t kJoinedRow = 512;  // ... to at most this many columns
  const View3& x = *views[0];
  bool unit_channels = x.channels > 1;
  bool packed_channels = x.inner < kShortInner && x.channels > 1;
  bool packed_rows = true;
  for (int v = 0; v < count; ++v) {
    const View3& view = *views[v];
    unit_channels &= view.channel_stride == 1;
    packed_channels &= view.channel_stride == x.inner && (view.inner_stride == 1 || x.inner == 1);
    packed_rows &= view.outer_stride == x.channels * x.inner || x.outer == 1;
  }
  if (packed_channels && (whole || x.inner == 1)) {
    const int64_t width = x.channels * x.inner;
    int64_t joined = 1;
    if (join && packed_rows && width < kWideRow) joined = smaller(x.outer, kJoinedRow / width);
    return {x.outer / joined, 1, joined, width * joined, x.outer % joined, x.inner};
  }
  if (unit_channels) return {x.outer * x.inner, x.inner, 1, x.channels, 0, 1};
  return {};
}

// A vector over positions alone, as one run: x[n, 1, 1] becomes x[1, 1, n].
NLM_INLINE View3 as_run(const View3& x) {
  return {x.data, x.dtype, 1, 1, x.outer, 0, 0, x.outer_stride};
}

}  // namespace nlm::NLM_ISA
