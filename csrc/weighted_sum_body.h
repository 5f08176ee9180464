// The CUDA kernel's work on one (block, thread); tests run the same code over the grid on the CPU.
//
// A thread sums runs of 16 bytes, reading every tensor once; the operations and their order are
// those of weighted_sum.cpp.
#pragma once

#include <cstdint>

#include "core/device.h"
#include "weighted_sum.h"

namespace nlm::NLM_ISA {

template <class T>
inline constexpr int kSumRun = 16 / sizeof(T);

// What the kernel gets by value (2.1 KB).
struct SumGrid {
  RowGrid grid;  // one row of runs
  const void* base;
  void* target;
  const void* tensors[kWeightedSumTensors];
  double weights[kWeightedSumTensors];
  double divisor, scale;
  int count;
  int64_t size;
};

// `packed`: all runs but the last can be moved as packs.
template <class T>
SumGrid make_sum_grid(const WeightedSum& sum, bool& packed) {
  SumGrid work = {};
  work.grid = RowGrid::make(1, (sum.size + kSumRun<T> - 1) / kSumRun<T>);
  work.base = sum.base;
  work.target = sum.target;
  packed = is_aligned(sum.base, 16) && is_aligned(sum.target, 16);
  for (int k = 0; k < sum.count; ++k) {
    work.tensors[k] = sum.tensors[k].data;
    work.weights[k] = sum.tensors[k].weight;
    packed &= is_aligned(sum.tensors[k].data, 16);
  }
  work.divisor = sum.divisor;
  work.scale = sum.scale;
  work.count = sum.count;
  work.size = sum.size;
  return work;
}

// The entries of one pack; `at` counts in packs.
template <class T, int kCount, class Memory>
NLM_DEVICE void sum_pack(const SumGrid& work, int64_t at, const Memory& memory) {
  using S = ComputeType<T>;
  using Run = Pack<T, kCount>;
  S start[kCount] = {}, total[kCount] = {};
  if (work.base != nullptr) {
    const Run base = memory.template base<Run>()[at];
    for (int i = 0; i < kCount; ++i) start[i] = widen(base.value[i]);
  }
  for (int k = 0; k < work.count; ++k) {
    const Run tensor = memory.template tensor<Run>(k)[at];
    const S weight = static_cast<S>(work.weights[k]);
    for (int i = 0; i < kCount; ++i) total[i] += weight * (widen(tensor.value[i]) - start[i]);
  }
  const S divisor = static_cast<S>(work.divisor), scale = static_cast<S>(work.scale);
  Run result;
  for (int i = 0; i < kCount; ++i) {
    if (divisor != 1) total[i] = total[i] / divisor;
    total[i] = total[i] * scale;
    if (work.base != nullptr) total[i] = work.count == 0 ? start[i] : start[i] + total[i];
    narrow(total[i], result.value[i]);
  }
  memory.template target<Run>()[at] = result;
}

template <class T, bool kPacked, class Memory>
NLM_DEVICE void sum_body(const SumGrid& work, int64_t block, int thread, const Memory& memory) {
  constexpr int kRun = kSumRun<T>;
  if (work.grid.row(block, thread) > 0) return;
  const int64_t end = work.grid.end_column(block);
  for (int64_t run = work.grid.first_column(block, thread); run < end; run += work.grid.lanes) {
    if (kPacked && (run + 1) * kRun <= work.size) {
      sum_pack<T, kRun>(work, run, memory);
    } else {
      for (int64_t i = run * kRun; i < (run + 1) * kRun && i < work.size; ++i) {
        sum_pack<T, 1>(work, i, memory);
      }
    }
  }
}

}  // namespace nlm::NLM_ISA
