// The CUDA kernels' work on the gradients of one (block, thread); see scale_shift_body.h.
//
// A block has some channels, some tasks, and some of the walks through the positions: first,
// first + walks, first + 2 walks, ... A thread writes grad_x along its walk, a pack of channels or
// of inner positions at a time, and sums grad * x and grad in float64: in registers for the task at
// hand, in slots of its own in shared memory for the others. Then the block adds its walks and
// writes its row of partial[walk_blocks, tasks, channels], which the caller adds. Where the tasks
// do not fit into shared memory, blocks share them, and each passes by the positions of the others.
// No atomics, and an order of the sums that follows from shape, type and the nearer dimension
// alone.
#pragma once

#include <type_traits>

#include "scale_shift_body.h"

namespace nlm::NLM_ISA {

// A view by outer index, inner index (in packs, where packs lie along it), first channel of a
// thread, and column of a pack.
struct WalkView {
  int64_t outer_stride, inner_stride, channel_stride, column_stride;
};

struct WalkPlace {
  int64_t walk_block, channel, first_task;
  int walk_lane;
};

using SumPair = Pack<double, 2>;  // of grad * x and of grad

struct BackwardGrid {
  WalkView grad, x, grad_x;
  Tasks tasks;
  int64_t outer, inner, channels;  // inner in packs, where packs lie along it
  bool channels_first;             // packs and neighbouring threads lie along the channels
  bool wide;                       // packs are moved at once
  int pack, sums;                  // columns of a pack; channels of a thread
  int walk_lanes, channel_lanes;   // powers of two; their product is a block's threads
  int slots;                       // tasks of a block
  int64_t walk_blocks, task_blocks, channel_blocks;
  int64_t outer_step, inner_step;  // walks = outer_step * inner + inner_step

  int64_t blocks() const { return walk_blocks * task_blocks * channel_blocks; }
  int shared_bytes() const { return slots * sums * kBlockThreads * int{sizeof(SumPair)}; }
  NLM_DEVICE WalkPlace place(int64_t block, int thread) const {
    const int64_t others = quotient(block, channel_blocks);
    const int64_t walk_block = quotient(others, task_blocks);
    const int channel_lane = channels_first ? thread % channel_lanes : thread / walk_lanes;
    return {walk_block, ((block - others * channel_blocks) * channel_lanes + channel_lane) * sums,
            (others - walk_block * task_blocks) * slots,
            channels_first ? thread / channel_lanes : thread % walk_lanes};
  }
};

// 64 KB of slots: three blocks on a multiprocessor of an H100, and one wave of them on its 132.
inline constexpr int64_t kMostSlots = 16;
inline constexpr int64_t kWantedBlocks = 3 * 132;

// Columns of a pack: 16 bytes of them where they divide the columns, but at most four channels,
// whose sums fit into registers, and whose slots fit into shared memory.
inline int backward_pack(bool channels_first, int64_t columns, int64_t tasks, int element_bytes) {
  int pack = 16 / element_bytes;
  if (pack > 4 && (channels_first || columns % pack != 0)) pack = 4;
  if (!channels_first) return columns % pack == 0 ? pack : 1;
  while (pack > 1 && (columns % pack != 0 || tasks * pack > kMostSlots)) pack /= 2;
  return pack;
}

// Enough to fill a GPU, but at least four positions of a thread, and the rows of `partial` at most
// 4 MB or an eighth of x.
inline int64_t count_walk_blocks(const BackwardGrid& work, int64_t x_bytes) {
  const int64_t row_bytes = work.tasks.count * work.channels * int64_t{sizeof(SumPair)};
  const int64_t most = (x_bytes / 8 > (4 << 20) ? x_bytes / 8 : 4 << 20) / (row_bytes + 1);
  const int64_t longest = (work.outer * work.inner - 1) / (work.walk_lanes * 4) + 1;
  int64_t count = kWantedBlocks / (work.channel_blocks * work.task_blocks);
  if (count > most) count = most;
  if (count > longest) count = longest;
  return count > 1 ? count : 1;
}

inline WalkView walk_view(const View3& view, BackwardGrid& work, int element_bytes) {
  const RowView rows = row_view(view, work.channels_first);
  const int64_t columns = work.channels_first ? view.channels : view.inner;
  work.wide = work.wide && takes_packs(view, rows, columns, work.pack, element_bytes);
  const int64_t outer = rows.outer_stride, middle = rows.middle_stride, step = rows.column_stride;
  return work.channels_first ? WalkView{outer, middle, step, step}
                             : WalkView{outer, step * work.pack, middle, step};
}

inline BackwardGrid make_backward_grid(const View3& grad, const View3& x, const View3& grad_x,
                                       const Tasks& tasks) {
  const int element_bytes = x.dtype == DType::kFloat64 ? 8 : x.dtype == DType::kFloat32 ? 4 : 2;
  BackwardGrid work = {};
  work.tasks = tasks;
  work.outer = x.outer;
  work.channels = x.channels;
  work.channels_first = channels_are_columns(x);
  const int64_t columns = work.channels_first ? x.channels : x.inner;
  work.pack = backward_pack(work.channels_first, columns, tasks.count, element_bytes);
  work.sums = work.channels_first ? work.pack : 1;
  work.inner = work.channels_first ? x.inner : x.inner / work.pack;
  work.wide = work.pack > 1;
  work.grad = walk_view(grad, work, element_bytes);
  work.x = walk_view(x, work, element_bytes);
  work.grad_x = walk_view(grad_x, work, element_bytes);
  const int64_t fitting = kMostSlots / work.sums;
  work.task_blocks = tasks.count > 0 ? (tasks.count - 1) / fitting + 1 : 1;
  work.slots = static_cast<int>((tasks.count + work.task_blocks - 1) / work.task_blocks);
  const int64_t wanted = work.channels_first ? x.channels / work.pack : x.outer * work.inner;
  int along = 1;
  while (along < 32 && along < wanted) along *= 2;
  work.channel_lanes = work.channels_first ? along : kBlockThreads / along;
  work.walk_lanes = kBlockThreads / work.channel_lanes;
  work.channel_blocks = (x.channels - 1) / (work.channel_lanes * work.sums) + 1;
  work.walk_blocks = count_walk_blocks(work, x.outer * x.channels * x.inner * element_bytes);
  const int64_t walks = work.walk_blocks * work.walk_lanes;
  work.outer_step = walks / work.inner;
  work.inner_step = walks % work.inner;
  return work;
}

template <int k>
using Int = std::integral_constant<int, k>;
// go(pack, sums, wide): the grid's, as constants.
template <class T, class Go>
auto with_pack(const BackwardGrid& work, const Go& go) {
  constexpr int kWide = 16 / sizeof(T);
  constexpr int kMost = kWide < 4 ? kWide : 4;
  const auto choose = [&](auto wide) {
    if (!work.channels_first) {
      return work.pack == kWide ? go(Int<kWide>{}, Int<1>{}, wide)
                                : go(Int<kMost>{}, Int<1>{}, wide);
    }
    return work.pack == 2 ? go(Int<2>{}, Int<2>{}, wide) : go(Int<kMost>{}, Int<kMost>{}, wide);
  };
  if (work.pack == 1) return go(Int<1>{}, Int<1>{}, std::false_type{});
  return work.wide ? choose(std::true_type{}) : choose(std::false_type{});
}

template <class T, int kPack, bool kWide, class Address>
NLM_DEVICE Pack<T, kPack> read_pack(const Address& x, int64_t at, int64_t column_stride) {
  const auto elements = x.template as<const T>();
  Pack<T, kPack> pack;
  if constexpr (kWide) pack = x.template as<const Pack<T, kPack>>()[at / kPack];
  for (int i = 0; !kWide && i < kPack; ++i) pack.value[i] = elements[at + i * column_stride];
  return pack;
}

// First phase: grad_x, and the sums of every thread in its slots.
template <class T, int kPack, int kSums, bool kWide, class Memory>
NLM_DEVICE void backward_body(const BackwardGrid& work, int64_t block, int thread,
                              const Memory& memory) {
  using Compute = ComputeType<T>;
  using Values = Pack<T, kPack>;
  constexpr int kAhead = !kWide && kPack > 1 ? 1 : sizeof(Values) >= 16 || kSums >= 4 ? 2 : 4;
  constexpr int kUnknown = -1, kNone = -2;  // no task: of an id out of range; so far
  const auto slots = memory.template shared<SumPair>();
  for (int s = 0; s < work.slots * kSums; ++s) slots[s * kBlockThreads + thread] = {};
  const WalkPlace place = work.place(block, thread);
  if (place.channel >= work.channels) return;
  SumPair sums[kSums] = {};
  Pack<Compute, kSums> scale = {};
  const bool has_ids = work.tasks.ids != nullptr;
  const auto ids = memory.task_ids.template as<const int64_t>();
  int slot = kNone;  // what the sums and the scale belong to
  const auto put_sums = [&] {
    if (slot < 0) return;
    for (int i = 0; i < kSums; ++i) slots[(slot * kSums + i) * kBlockThreads + thread] = sums[i];
  };
  const int64_t walk = place.walk_block * work.walk_lanes + place.walk_lane;
  int64_t outer = quotient(walk, work.inner);
  int64_t inner = walk - outer * work.inner;
  const auto advance = [&] {
    outer += work.outer_step;
    inner += work.inner_step;
    if (inner < work.inner) return;
    inner -= work.inner;
    ++outer;
  };
  while (outer < work.outer) {
    Values grads[kAhead], values[kAhead];
    int64_t results_at[kAhead], tasks[kAhead];
    int count = 0;
    // kAhead positions: no load waits for another; past the end the last outer index is read again.
    for (int k = 0; k < kAhead; ++k) {
      while (work.task_blocks > 1 && outer < work.outer) {
        const int64_t task = task_of(work.tasks, outer, memory);
        const int64_t owner = (task < 0 ? 0 : task) - place.first_task;
        if (owner >= 0 && owner < work.slots) break;
        advance();
      }
      const int64_t readable = outer < work.outer ? outer : work.outer - 1;
      count += outer < work.outer;
      tasks[k] = has_ids ? ids[quotient(readable, work.tasks.outer_per_sample)] : 0;
      const auto at = [&](const WalkView& view) {
        return readable * view.outer_stride + inner * view.inner_stride +
               place.channel * view.channel_stride;
      };
      grads[k] = read_pack<T, kPack, kWide>(memory.grad, at(work.grad), work.grad.column_stride);
      values[k] = read_pack<T, kPack, kWide>(memory.x, at(work.x), work.x.column_stride);
      results_at[k] = at(work.grad_x);
      advance();
    }
    for (int k = 0; k < kAhead; ++k) {
      if (k >= count) continue;
      const bool known = tasks[k] >= 0 && tasks[k] < work.tasks.count;
      const int next = known ? static_cast<int>(tasks[k] - place.first_task) : kUnknown;
      if (next != slot) {
        put_sums();
        slot = next;
        const int64_t first = (place.first_task + slot) * work.channels + place.channel;
        for (int i = 0; i < kSums; ++i) {
          if (slot >= 0) sums[i] = slots[(slot * kSums + i) * kBlockThreads + thread];
          scale.value[i] = slot >= 0 ? memory.scale.template as<const Compute>()[first + i]
                                     : static_cast<Compute>(float_of_bits(kNaNBits));
        }
      }
      Values result;
      for (int i = 0; i < kPack; ++i) {
        const Compute g = widen(grads[k].value[i]);
        const Compute value = widen(values[k].value[i]);
        narrow(g * scale.value[i % kSums], result.value[i]);
        SumPair& sum = sums[i % kSums];
        sum.value[0] += static_cast<double>(g) * static_cast<double>(value);
        sum.value[1] += static_cast<double>(g);
      }
      if constexpr (kWide) {
        memory.result.template as<Values>()[results_at[k] / kPack] = result;
      } else {
        const auto results = memory.result.template as<T>();
        for (int i = 0; i < kPack; ++i) {
          results[results_at[k] + i * work.grad_x.column_stride] = result.value[i];
        }
      }
    }
  }
  put_sums();
}

// Second phase: the sums over the block's walks.
template <int kSums, class Memory>
NLM_DEVICE void backward_sums_body(const BackwardGrid& work, int64_t block, int thread,
                                   const Memory& memory) {
  const auto slots = memory.template shared<SumPair>();
  const WalkPlace first = work.place(block, 0);
  const int block_channels = work.channel_lanes * kSums;
  const int step = work.channels_first ? work.channel_lanes : 1;
  const int lane_step = work.channels_first ? 1 : work.walk_lanes;
  for (int e = thread; e < work.slots * block_channels; e += kBlockThreads) {
    const int slot = e / block_channels;
    const int64_t task = first.first_task + slot;
    const int64_t channel = first.channel + e % block_channels;
    if (task >= work.tasks.count || channel >= work.channels) continue;
    const int from =
        (slot * kSums + e % kSums) * kBlockThreads + e % block_channels / kSums * lane_step;
    SumPair total = {};
    for (int w = 0; w < work.walk_lanes; ++w) {
      const SumPair sum = slots[from + w * step];
      total.value[0] += sum.value[0];
      total.value[1] += sum.value[1];
    }
    const int64_t at = (first.walk_block * work.tasks.count + task) * work.channels + channel;
    memory.grad_scale.template as<double>()[at] = total.value[0];
    memory.grad_shift.template as<double>()[at] = total.value[1];
  }
}

}  // namespace nlm::NLM_ISA
