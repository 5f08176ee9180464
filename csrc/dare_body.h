// The CUDA kernel's work on one (block, thread); tests run the same code over the grid on the CPU.
//
// A column is a run of whole counters, of four entries each: one for float32 and float64, two for
// the 16-bit types. Runs begin at positions that four divides, so the first of them may begin
// before the first entry.
#pragma once

#include <cstdint>

#include "core/device.h"
#include "core/view.h"
#include "dare.h"

namespace nlm::NLM_ISA {

struct DropGrid {
  RowGrid grid;  // one row of runs
  int64_t count;
  int64_t first_counter;
  int lead;  // entries by which the first run begins before the first entry
  uint32_t seed[2];
  uint32_t threshold;
};

template <class T>
inline constexpr int kRunCounters = sizeof(T) == 2 ? 2 : 1;

// `packed`: all runs but the last can be moved as packs.
template <class T>
DropGrid make_drop_grid(const void* expert, const void* base, const void* out, int64_t count,
                        const Drop& drop, bool& packed) {
  constexpr int kRun = 4 * kRunCounters<T>;
  const int lead = static_cast<int>(drop.offset % 4);
  constexpr int kAlignment = alignof(Pack<T, kRun>);
  packed = lead == 0 && is_aligned(expert, kAlignment) && is_aligned(base, kAlignment) &&
           is_aligned(out, kAlignment);
  return {RowGrid::make(1, (lead + count + kRun - 1) / kRun),
          count,
          drop.offset / 4,
          lead,
          {static_cast<uint32_t>(drop.seed), static_cast<uint32_t>(drop.seed >> 32)},
          drop.threshold};
}

// Philox4x32-10.
NLM_DEVICE void draw(int64_t counter, uint32_t key0, uint32_t key1, uint32_t* words) {
  uint32_t x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32);
  uint32_t x2 = 0, x3 = 0;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * x0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * x2;
    x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ key0;
    x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ key1;
    x1 = static_cast<uint32_t>(product1);
    x3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  words[0] = x0;
  words[1] = x1;
  words[2] = x2;
  words[3] = x3;
}

template <class T>
NLM_DEVICE T rescaled(T expert, T base, bool kept, ComputeType<T> scale) {
  if (!kept) return base;
  T result;
  narrow(widen(base) + scale * (widen(expert) - widen(base)), result);
  return result;
}

template <class T, bool kPacked, class Memory>
NLM_DEVICE void drop_body(const DropGrid& work, ComputeType<T> scale, int64_t block, int thread,
                          const Memory& memory) {
  constexpr int kRun = 4 * kRunCounters<T>;
  using Run = Pack<T, kRun>;
  if (work.grid.row(block, thread) > 0) return;
  const int64_t end = work.grid.end_column(block);
  for (int64_t run = work.grid.first_column(block, thread); run < end; run += work.grid.lanes) {
    uint32_t words[kRun];
    for (int c = 0; c < kRunCounters<T>; ++c) {
      draw(work.first_counter + run * kRunCounters<T> + c, work.seed[0], work.seed[1],
           words + 4 * c);
    }
    const int64_t first = run * kRun - work.lead;
    if (kPacked && first + kRun <= work.count) {
      const Run expert = memory.expert.template as<const Run>()[run];
      Run result = memory.base.template as<const Run>()[run];
      for (int k = 0; k < kRun; ++k) {
        result.value[k] =
            rescaled(expert.value[k], result.value[k], words[k] >= work.threshold, scale);
      }
      memory.out.template as<Run>()[run] = result;
    } else {
      for (int k = 0; k < kRun; ++k) {
        const int64_t i = first + k;
        if (i < 0 || i >= work.count) continue;
        memory.out.template as<T>()[i] =
            rescaled(memory.expert.template as<const T>()[i], memory.base.template as<const T>()[i],
                     words[k] >= work.threshold, scale);
      }
    }
  }
}

}  // namespace nlm::NLM_ISA
