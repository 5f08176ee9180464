// The CUDA kernels' work on one (block, thread); tests run the same code over the grid on the CPU.
//
// Forward: rows and columns of the output. The columns are the dimension that is contiguous in
// memory, the channels or the inner positions, so that neighbouring threads touch neighbouring
// elements, in packs of 16 bytes where sizes, strides and addresses allow.
//
// Backward: a thread walks the positions first, first + walks, first + 2 walks, ... of one channel.
// It writes grad_x, sums grad * x and grad in float64, and puts the sums of each task it met into
// its own row of partial[walks, tasks, channels]. The caller adds the rows: no atomics, no barrier,
// and the same bits on every run, as `walks` follows from the shape alone.
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

inline RowView row_view(const View3& view, bool columns_are_channels) {
  return columns_are_channels ? RowView{view.outer_stride, view.inner_stride, view.channel_stride}
                              : RowView{view.outer_stride, view.channel_stride, view.inner_stride};
}

// Whether `view` can be read in packs of `count` along its columns of `columns` elements.
inline bool takes_packs(const View3& view, const RowView& rows, int64_t columns, int count,
                        int element_bytes) {
  return rows.column_stride == 1 && columns % count == 0 && rows.outer_stride % count == 0 &&
         rows.middle_stride % count == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % (count * element_bytes) == 0;
}

// `pack` becomes the number of elements of a pack: 16 bytes of them, or 1.
inline ForwardGrid make_forward_grid(const View3& x, const View3& y, const Tasks& tasks,
                                     int element_bytes, int& pack) {
  const bool by_channel = channels_are_columns(x);
  int64_t columns = by_channel ? x.channels : x.inner;
  const int64_t middle = by_channel ? x.inner : x.channels;
  RowView x_rows = row_view(x, by_channel);
  RowView y_rows = row_view(y, by_channel);
  pack = 16 / element_bytes;
  if (takes_packs(x, x_rows, columns, pack, element_bytes) &&
      takes_packs(y, y_rows, columns, pack, element_bytes)) {
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
  const int64_t task = memory.task_ids()[quotient(outer, tasks.outer_per_sample)];
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
  const auto x = memory.template x<Pack<T, kPack>>();
  const auto y = memory.template y<Pack<T, kPack>>();
  const auto scale = memory.template scale<Compute>();
  const auto shift = memory.template shift<Compute>();
  const int64_t x_row = outer * work.x.outer_stride + middle * work.x.middle_stride;
  const int64_t y_row = outer * work.y.outer_stride + middle * work.y.middle_stride;
  const int64_t end = work.grid.end_column(block);
  for (int64_t column = work.grid.first_column(block, thread); column < end;
       column += work.grid.lanes) {
    Pack<T, kPack> pack = x[x_row + column * work.x.column_stride];
    for (int i = 0; i < kPack; ++i) {
      Compute a = static_cast<Compute>(float_of_bits(kNaNBits));
      Compute b = a;
      if (task >= 0) {
        const int64_t channel = work.columns_are_channels ? column * kPack + i : middle;
        a = scale[task * work.channels + channel];
        b = shift[task * work.channels + channel];
      }
      narrow(widen(pack.value[i]) * a + b, pack.value[i]);
    }
    y[y_row + column * work.y.column_stride] = pack;
  }
}

struct BackwardGrid {
  View3 grad, x, grad_x;
  Tasks tasks;
  int64_t walks;
  int64_t outer_step, inner_step;  // walks = outer_step * inner + inner_step
  int walk_lanes, channel_lanes;   // powers of two; their product is a block's threads
  bool channels_first;             // neighbouring threads take neighbouring channels
  int64_t walk_blocks, channel_blocks;
};

// Rows of `partial`: enough walks to fill a GPU, few enough that partial is small (4 MB each, or 32
// walks).
inline int64_t walk_count(int64_t positions, int64_t tasks, int64_t channels) {
  constexpr int64_t kSums = 1 << 18;
  const int64_t sums_per_walk = tasks * channels;
  int64_t walks = sums_per_walk > 0 ? kSums / sums_per_walk : 1;
  if (walks < 32) walks = 32;
  return walks < positions ? walks : positions;
}

inline BackwardGrid make_backward_grid(const View3& grad, const View3& x, const View3& grad_x,
                                       const Tasks& tasks, int64_t walks) {
  BackwardGrid work = {grad, x, grad_x, tasks, walks, walks / x.inner, walks % x.inner,
                       1,    1, false,  0,     0};
  work.channels_first = channels_are_columns(x);
  int& along = work.channels_first ? work.channel_lanes : work.walk_lanes;
  int& across = work.channels_first ? work.walk_lanes : work.channel_lanes;
  const int64_t wanted = work.channels_first ? x.channels : walks;
  while (along < kBlockThreads && along < wanted) along *= 2;
  across = kBlockThreads / along;
  work.walk_blocks = (walks + work.walk_lanes - 1) / work.walk_lanes;
  work.channel_blocks = (x.channels + work.channel_lanes - 1) / work.channel_lanes;
  return work;
}

template <class T, class Memory>
NLM_DEVICE void backward_body(const BackwardGrid& work, int64_t block, int thread,
                              const Memory& memory) {
  using Compute = ComputeType<T>;
  const int walk_lane =
      work.channels_first ? thread / work.channel_lanes : thread % work.walk_lanes;
  const int channel_lane =
      work.channels_first ? thread % work.channel_lanes : thread / work.walk_lanes;
  const int64_t walk = block / work.channel_blocks * work.walk_lanes + walk_lane;
  const int64_t channel = block % work.channel_blocks * work.channel_lanes + channel_lane;
  const View3& x = work.x;
  if (walk >= work.walks || channel >= x.channels) return;

  const auto grads = memory.template grad<T>();
  const auto values = memory.template x<T>();
  const auto results = memory.template grad_x<T>();
  const auto scales = memory.template scale<Compute>();
  const auto scale_sums = memory.grad_scale();
  const auto shift_sums = memory.grad_shift();
  double scale_sum = 0;
  double shift_sum = 0;
  int64_t task = 0;
  Compute scale = 0;
  int64_t sums_at = 0;
  int64_t task_outer = -1;  // the outer index that `task` was read for
  bool open = false;        // the sums hold something of `task`

  int64_t outer = quotient(walk, x.inner);
  int64_t inner = walk - outer * x.inner;
  while (outer < x.outer) {
    if (outer != task_outer) {
      const int64_t next = task_of(work.tasks, outer, memory);
      if (!open || next != task) {
        if (open && task >= 0) {
          scale_sums[sums_at] += scale_sum;
          shift_sums[sums_at] += shift_sum;
        }
        task = next;
        scale_sum = shift_sum = 0;
        sums_at = (walk * work.tasks.count + task) * x.channels + channel;
        scale = task >= 0 ? scales[task * x.channels + channel]
                          : static_cast<Compute>(float_of_bits(kNaNBits));
        open = true;
      }
      task_outer = outer;
    }
    const Compute g =
        widen(grads[outer * work.grad.outer_stride + channel * work.grad.channel_stride +
                    inner * work.grad.inner_stride]);
    const Compute value =
        widen(values[outer * x.outer_stride + channel * x.channel_stride + inner * x.inner_stride]);
    narrow(g * scale,
           results[outer * work.grad_x.outer_stride + channel * work.grad_x.channel_stride +
                   inner * work.grad_x.inner_stride]);
    scale_sum += static_cast<double>(g) * static_cast<double>(value);
    shift_sum += static_cast<double>(g);
    outer += work.outer_step;
    inner += work.inner_step;
    if (inner >= x.inner) {
      inner -= x.inner;
      ++outer;
    }
  }
  if (open && task >= 0) {
    scale_sums[sums_at] += scale_sum;
    shift_sums[sums_at] += shift_sum;
  }
}

}  // namespace nlm::NLM_ISA
