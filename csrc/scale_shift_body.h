// The CUDA kernels' work on one (block, thread); tests run the same code over the grid on the CPU.
//
// Rows and columns of the output. The columns are the dimension that is contiguous in memory, the
// channels or the inner positions, so that neighbouring threads touch neighbouring elements, in
// packs of 16 bytes where sizes, strides and addresses allow, and so do scale and shift where the
// columns are channels. The gradients are scale_shift_backward_body.h's.
#pragma once

#include <cstdint>

#include "core/device.h"
#include "core/view.h"
#include "scale_shift.h"

namespace nlm::NLM_ISA {

inline constexpr uint32_t kNaNBits = 0x7fc00000u;

NLM_DEVICE int64_t absolute(int64_t value) { return value < 0 ? -value : value; }

// Neighbouring channels are closer in memory than neighbouring inner positions.
inline bool channels_are_columns(const View3& x) {
  return x.inner == 1 || absolute(x.channel_stride) <= absolute(x.inner_stride);
}

// A view as [outer, middle, columns]: of channels and inner positions, one is the middle dimension.
struct RowView {
  int64_t outer_stride, middle_stride, column_stride;
};

struct ForwardGrid {
  RowGrid grid;    // rows [outer, middle], columns in packs
  int64_t middle;  // size
  int64_t channels;
  bool columns_are_channels;
  RowView x, y;  // strides in elements, but those of packs in packs
  Tasks tasks;
};

// The stride of a dimension of one element is no matter, and may be anything.
inline RowView row_view(const View3& view, bool columns_are_channels) {
  const int64_t outer = view.outer > 1 ? view.outer_stride : 0;
  const int64_t channel = view.channels > 1 ? view.channel_stride : 0;
  const int64_t inner = view.inner > 1 ? view.inner_stride : 0;
  return columns_are_channels ? RowView{outer, inner, channel} : RowView{outer, channel, inner};
}

// Whether `view` can be read in packs of `count` along its columns of `columns` elements.
inline bool takes_packs(const View3& view, const RowView& rows, int64_t columns, int count,
                        int element_bytes) {
  return rows.column_stride == 1 && columns % count == 0 && rows.outer_stride % count == 0 &&
         rows.middle_stride % count == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % (count * element_bytes) == 0;
}

// `pack` becomes the number of elements of a pack: 16 bytes of them, or 1.
inline ForwardGrid make_forward_grid(const View3& x, const View3& y, const void* scale,
                                     const void* shift, const Tasks& tasks, int element_bytes,
                                     int& pack) {
  const bool by_channel = channels_are_columns(x);
  int64_t columns = by_channel ? x.channels : x.inner;
  const int64_t middle = by_channel ? x.inner : x.channels;
  RowView x_rows = row_view(x, by_channel);
  RowView y_rows = row_view(y, by_channel);
  pack = 16 / element_bytes;
  if (takes_packs(x, x_rows, columns, pack, element_bytes) &&
      takes_packs(y, y_rows, columns, pack, element_bytes) &&
      (!by_channel || (is_aligned(scale, 16) && is_aligned(shift, 16)))) {
    columns /= pack;
    x_rows = {x_rows.outer_stride / pack, x_rows.middle_stride / pack, 1};
    y_rows = {y_rows.outer_stride / pack, y_rows.middle_stride / pack, 1};
  } else {
    pack = 1;
  }
  return {RowGrid::make(x.outer * middle, columns),
          middle,
          x.channels,
          by_channel,
          x_rows,
          y_rows,
          tasks};
}

// The task of an outer index; -1 for an id out of range, which the caller turns into NaN: checking
// the ids beforehand would make the host wait for the GPU.
template <class Memory>
NLM_DEVICE int64_t task_of(const Tasks& tasks, int64_t outer, const Memory& memory) {
  if (tasks.ids == nullptr) return 0;
  const int64_t task =
      memory.task_ids.template as<const int64_t>()[quotient(outer, tasks.outer_per_sample)];
  return task >= 0 && task < tasks.count ? task : -1;
}

template <class T, int kPack, class Memory>
NLM_DEVICE void forward_body(const ForwardGrid& work, int64_t block, int thread,
                             const Memory& memory) {
  using Compute = ComputeType<T>;
  const int64_t row = work.grid.row(block, thread);
  if (row >= work.grid.rows) return;
  const int64_t outer = quotient(row, work.middle);
  const int64_t middle = row - outer * work.middle;
  const int64_t task = task_of(work.tasks, outer, memory);
  const auto x = memory.x.template as<const Pack<T, kPack>>();
  const auto y = memory.result.template as<Pack<T, kPack>>();
  const int64_t x_row = outer * work.x.outer_stride + middle * work.x.middle_stride;
  const int64_t y_row = outer * work.y.outer_stride + middle * work.y.middle_stride;
  const int64_t end = work.grid.end_column(block);
  using Parameters = Pack<Compute, kPack>;
  Parameters a = {}, b = {};
  if (task < 0) {
    for (int i = 0; i < kPack; ++i) {
      a.value[i] = b.value[i] = static_cast<Compute>(float_of_bits(kNaNBits));
    }
  } else if (!work.columns_are_channels) {
    const int64_t channel = task * work.channels + middle;
    for (int i = 0; i < kPack; ++i) {
      a.value[i] = memory.scale.template as<const Compute>()[channel];
      b.value[i] = memory.shift.template as<const Compute>()[channel];
    }
  }
  const bool reads_parameters = task >= 0 && work.columns_are_channels;
  const auto scale = memory.scale.template as<const Parameters>();
  const auto shift = memory.shift.template as<const Parameters>();
  const int64_t first_parameter = reads_parameters ? task * (work.channels / kPack) : 0;
  for (int64_t column = work.grid.first_column(block, thread); column < end;
       column += work.grid.lanes) {
    Pack<T, kPack> pack = x[x_row + column * work.x.column_stride];
    if (reads_parameters) {
      a = scale[first_parameter + column];
      b = shift[first_parameter + column];
    }
    for (int i = 0; i < kPack; ++i) {
      narrow(widen(pack.value[i]) * a.value[i] + b.value[i], pack.value[i]);
    }
    y[y_row + column * work.y.column_stride] = pack;
  }
}

}  // namespace nlm::NLM_ISA
