// The bodies of permute and scale_shift over their grids (emulation.h).
#define NLM_ISA emulation

#include "emulation.h"
#include "permute_body.h"
#include "scale_shift_backward_body.h"
#include "scale_shift_body.h"

using namespace nlm;
using namespace nlm::emulation;

namespace {

struct PermuteMemory {
  const Plan& plan;
  const Range *source_range, *target_range, *index_ranges;  // an index range per axis of the item
  Range shared_range;

  template <class T>
  Checked<const T> source() const {
    return checked<const T>(plan.source, *source_range);
  }
  template <class T>
  Checked<T> target() const {
    return checked<T>(plan.target, *target_range);
  }
  Checked<const int64_t> index(int a) const {
    const auto begin = reinterpret_cast<uintptr_t>(plan.axes[a].index);
    for (const Range* range = index_ranges;; ++range) {
      if (range->begin == begin) return checked<const int64_t>(plan.axes[a].index, *range);
    }
  }
  template <class T>
  Checked<T> shared() const {
    return checked<T>(reinterpret_cast<const void*>(shared_range.begin), shared_range);
  }
  void fail() const { ++violations; }
};

template <class T, int kPack, Columns kColumns, class Write>
int64_t run_permute(const PermuteGrid& work, const Range* ranges, const Write& write,
                    int64_t first_block, int64_t end_block) {
  std::vector<Word16> staged(shared_bytes(work, sizeof(T)) / sizeof(Word16) + 1);
  const auto begin = reinterpret_cast<uintptr_t>(staged.data());
  const Range shared = {begin, begin + static_cast<uintptr_t>(shared_bytes(work, sizeof(T)))};
  const PermuteMemory memory = {work.plan, ranges, ranges + 1, ranges + 2, shared};
  const auto stage = [&](int64_t block, int thread) {
    if (kColumns == Columns::kStaged) stage_body<T>(work, block, thread, memory);
  };
  const auto gather = [&](int64_t block, int thread) {
    permute_body<T, kPack, kColumns>(work, block, thread, memory, write);
  };
  return run(work.grid.blocks(), first_block, end_block, stage, gather);
}

template <class T, int kPack, class Write>
int64_t run_permute(const PermuteGrid& work, const Range* ranges, const Write& write,
                    int64_t first_block, int64_t end_block) {
  const auto go =
      columns_of(work) == Columns::kStaged     ? run_permute<T, kPack, Columns::kStaged, Write>
      : columns_of(work) == Columns::kGathered ? run_permute<T, kPack, Columns::kGathered, Write>
                                               : run_permute<T, kPack, Columns::kCopied, Write>;
  return go(work, ranges, write, first_block, end_block);
}

template <class T, class Write>
int64_t run_permute(const Plan& plan, const Range* ranges, const Write& write, int64_t first_block,
                    int64_t end_block) {
  if (plan.elements == 0) return 0;
  constexpr int kPack = kPackOf<sizeof(T)>;
  int pack = 0;
  const PermuteGrid work = make_permute_grid(plan, sizeof(T), kPack, pack);
  return pack == kPack ? run_permute<T, kPack>(work, ranges, write, first_block, end_block)
                       : run_permute<T, 1>(work, ranges, write, first_block, end_block);
}

template <class T, class Compute>
int64_t run_add(const Plan& plan, const Range* ranges, double weight, int64_t first_block,
                int64_t end_block) {
  return run_permute<T>(plan, ranges, WriteSum<T, Compute>{static_cast<Compute>(weight)},
                        first_block, end_block);
}

struct ScaleShiftRanges {
  Range grad, x, y, scale, shift, ids, scale_sums, shift_sums;
};

struct ScaleShiftMemory {
  CheckedAddress grad, x, scale, shift, result, task_ids, grad_scale, grad_shift;
  Range shared_range = {};

  template <class T>
  Checked<T> shared() const {
    return checked<T>(reinterpret_cast<const void*>(shared_range.begin), shared_range);
  }
};

template <class T>
int64_t run_forward(const View3& x, const View3& y, const Tasks& tasks,
                    const ScaleShiftMemory& memory, int64_t first_block, int64_t end_block) {
  constexpr int kPack = 16 / sizeof(T);
  int pack = 0;
  const ForwardGrid work =
      make_forward_grid(x, y, memory.scale.data, memory.shift.data, tasks, sizeof(T), pack);
  return run(work.grid.blocks(), first_block, end_block, [&](int64_t block, int thread) {
    if (pack == kPack) {
      forward_body<T, kPack>(work, block, thread, memory);
    } else {
      forward_body<T, 1>(work, block, thread, memory);
    }
  });
}

template <class T>
int64_t run_backward(const BackwardGrid& work, ScaleShiftMemory memory) {
  const double nan = __builtin_nan("");
  std::vector<SumPair> slots(work.shared_bytes() / sizeof(SumPair), SumPair{{nan, nan}});
  const auto begin = reinterpret_cast<uintptr_t>(slots.data());
  memory.shared_range = {begin, begin + static_cast<uintptr_t>(work.shared_bytes())};
  return with_pack<T>(work, [&](auto pack, auto sums, auto wide) {
    const auto walk = [&](int64_t block, int thread) {
      backward_body<T, pack(), sums(), wide()>(work, block, thread, memory);
    };
    const auto add = [&](int64_t block, int thread) {
      backward_sums_body<sums()>(work, block, thread, memory);
    };
    return run(work.blocks(), 0, -1, walk, add);
  });
}

template <class T>
int64_t run_backward(const View3& grad, const View3& x, const View3& grad_x, const Tasks& tasks,
                     const ScaleShiftMemory& memory) {
  return run_backward<T>(make_backward_grid(grad, x, grad_x, tasks), memory);
}

}  // namespace

#include "selection_emulation.h"

extern "C" {

// ranges: source, target, then one per gathered axis.
int64_t emulate_permute(const PermuteItem* item, int element_bytes, const Range* ranges,
                        int64_t first_block, int64_t end_block, int* word_bytes) {
  Plan plan;
  make_plan(*item, plan);
  *word_bytes = widen_words(plan, element_bytes);
  const auto go = [&](auto word) {
    using T = decltype(word);
    return run_permute<T>(plan, ranges, WriteCopy<T>{}, first_block, end_block);
  };
  switch (*word_bytes) {
    case 1:
      return go(uint8_t{});
    case 2:
      return go(uint16_t{});
    case 4:
      return go(uint32_t{});
    case 8:
      return go(uint64_t{});
    case 16:
      return go(Word16{});
  }
  return -1;
}

int64_t emulate_permute_add(const PermuteItem* item, int dtype, double weight, const Range* ranges,
                            int64_t first_block, int64_t end_block) {
  Plan plan;
  make_plan(*item, plan);
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat16:
      return run_add<DeviceFloat16, float>(plan, ranges, weight, first_block, end_block);
    case DType::kBFloat16:
      return run_add<DeviceBFloat16, float>(plan, ranges, weight, first_block, end_block);
    case DType::kFloat32:
      return run_add<float, float>(plan, ranges, weight, first_block, end_block);
    case DType::kFloat64:
      return run_add<double, double>(plan, ranges, weight, first_block, end_block);
  }
  return -1;
}

int64_t emulate_scale_shift(const View3* x, const View3* y, const void* scale, const void* shift,
                            const Tasks* tasks, const ScaleShiftRanges* ranges, int64_t first_block,
                            int64_t end_block) {
  if (x->empty()) return 0;
  const ScaleShiftMemory memory = {{},
                                   {x->data, ranges->x},
                                   {scale, ranges->scale},
                                   {shift, ranges->shift},
                                   {y->data, ranges->y},
                                   {tasks->ids, ranges->ids},
                                   {},
                                   {}};
  switch (x->dtype) {
    case DType::kFloat16:
      return run_forward<DeviceFloat16>(*x, *y, *tasks, memory, first_block, end_block);
    case DType::kBFloat16:
      return run_forward<DeviceBFloat16>(*x, *y, *tasks, memory, first_block, end_block);
    case DType::kFloat32:
      return run_forward<float>(*x, *y, *tasks, memory, first_block, end_block);
    case DType::kFloat64:
      return run_forward<double>(*x, *y, *tasks, memory, first_block, end_block);
  }
  return -1;
}

int64_t emulate_partial_rows(const View3* x, int64_t tasks) {
  if (x->empty()) return 0;
  return make_backward_grid(*x, *x, *x, {nullptr, tasks, 1}).walk_blocks;
}

int64_t emulate_scale_shift_backward(const View3* grad, const View3* x, const View3* grad_x,
                                     const void* scale, const Tasks* tasks, double* partial_scale,
                                     double* partial_shift, const ScaleShiftRanges* ranges) {
  if (x->empty()) return 0;
  const ScaleShiftMemory memory = {{grad->data, ranges->grad},
                                   {x->data, ranges->x},
                                   {scale, ranges->scale},
                                   {},
                                   {grad_x->data, ranges->y},
                                   {tasks->ids, ranges->ids},
                                   {partial_scale, ranges->scale_sums},
                                   {partial_shift, ranges->shift_sums}};
  switch (x->dtype) {
    case DType::kFloat16:
      return run_backward<DeviceFloat16>(*grad, *x, *grad_x, *tasks, memory);
    case DType::kBFloat16:
      return run_backward<DeviceBFloat16>(*grad, *x, *grad_x, *tasks, memory);
    case DType::kFloat32:
      return run_backward<float>(*grad, *x, *grad_x, *tasks, memory);
    case DType::kFloat64:
      return run_backward<double>(*grad, *x, *grad_x, *tasks, memory);
  }
  return -1;
}

}  // extern "C"
