// The CUDA kernel's work on one (block, thread); tests run the same code over the grid on the CPU.
//
// A thread takes packs of 8 or 16 bytes, a block's width apart. The sums and shares of both signs
// are taken side by side with the vote, so that every value is read once; the operations and their
// order are those of sign_merge.cpp. The ballot is counted per thread, added up in shared memory
// and then in the result: integer sums, the same on every run.
//
// The kernel is cut into phases at its barriers; a phase may run its threads one after another.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/device.h"
#include "sign_merge.h"

namespace nlm::NLM_ISA {

template <class T>
using MergeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) MergePack {
  T value[kCount];
};

// What the kernel gets by value (2.1 KB).
struct MergeGrid {
  const void* base;
  void* target;
  const void* thresholds;
  uint8_t* contested;
  const void* experts[kSignMergeExperts];
  double weights[kSignMergeExperts];
  int64_t size;
  int64_t packs;  // whole ones; 0 where an address does not allow them
  double scale;
  int count;
  bool again;
  bool divided;  // mergekit's sums, by the weights that agree
};

inline constexpr int kPacksPerThread = 4;

// Elements of a pack: 16 bytes of float32; 8 of the narrow types, whose sums fill as many
// registers, and of float64, whose sums fill more.
template <class T>
inline constexpr int kMergePack = sizeof(T) == 8 ? 1 : 4;

template <class T>
MergeGrid make_merge_grid(const SignMergeItem& item) {
  constexpr int kPack = kMergePack<T>;
  MergeGrid work = {};
  work.base = item.base;
  work.target = item.target;
  work.thresholds = item.thresholds;
  work.contested = item.contested;
  auto addresses =
      reinterpret_cast<uintptr_t>(item.base) | reinterpret_cast<uintptr_t>(item.target);
  for (int k = 0; k < item.count; ++k) {
    work.experts[k] = item.experts[k].data;
    work.weights[k] = item.experts[k].weight;
    addresses |= reinterpret_cast<uintptr_t>(item.experts[k].data);
  }
  work.size = item.size;
  work.packs = addresses % sizeof(MergePack<T, kPack>) == 0 ? item.size / kPack : 0;
  work.scale = item.scale;
  work.count = item.count;
  work.again = item.again;
  work.divided = item.dialect != SignDialect::kMergekitSum;
  return work;
}

// Blocks for the packs and for the single elements behind them, whichever are more.
inline int64_t merge_blocks(const MergeGrid& work, int pack) {
  const int64_t singles = work.size - work.packs * pack;
  const int64_t most = work.packs > singles ? work.packs : singles;
  constexpr int64_t kPerBlock = kBlockThreads * kPacksPerThread;
  return (most + kPerBlock - 1) / kPerBlock;
}

// A thread's part of the ballot in one register: the sum of the signs, and 2^16 times the number of
// contested votes; both are below 2^15.
using ThreadBallot = int;

template <class Memory>
NLM_DEVICE void open_phase(int thread, const Memory& memory) {
  if (thread < 2) memory.shared(thread) = 0;
}

// One pack; `first` counts in packs.
template <class T, int kPack, SignDialect kDialect, class Memory>
NLM_DEVICE void merge_pack(const MergeGrid& work, int64_t first, const Memory& memory,
                           ThreadBallot& ballot) {
  using S = MergeType<T>;
  using Pack = MergePack<T, kPack>;
  const auto thresholds = memory.template thresholds<S>();
  const Pack base = memory.template base<Pack>()[first];
  S start[kPack], vote[kPack], plus[kPack], minus[kPack], plus_share[kPack], minus_share[kPack];
  for (int i = 0; i < kPack; ++i) {
    start[i] = widen(base.value[i]);
    vote[i] = plus[i] = minus[i] = plus_share[i] = minus_share[i] = 0;
  }
  for (int k = 0; k < work.count; ++k) {
    const Pack expert = memory.template expert<Pack>(k)[first];
    const S threshold = thresholds[k];
    const S weight = static_cast<S>(work.weights[k]);
    const S share = kDialect != SignDialect::kMergekit ? S{1} : work.divided ? weight : S{0};
    for (int i = 0; i < kPack; ++i) {
      const S difference = widen(expert.value[i]) - start[i];
      const S kept = (difference < 0 ? -difference : difference) < threshold ? S{0} : difference;
      const S value = kept * weight;
      const S voice = kDialect == SignDialect::kPeft ? kept : value;
      vote[i] += voice;
      plus[i] += voice > 0 ? value : S{0};
      minus[i] += voice < 0 ? value : S{0};
      plus_share[i] += voice > 0 ? share : S{0};
      minus_share[i] += voice < 0 ? share : S{0};
    }
  }
  Pack result;
  for (int i = 0; i < kPack; ++i) {
    if (kDialect == SignDialect::kGlobal && !work.again) {
      ballot += (vote[i] > 0) - (vote[i] < 0);
      const bool contested = vote[i] == 0 && plus_share[i] > 0;
      if (contested) ballot += 1 << 16;
      if (contested) memory.contested()[first * kPack / kSignMergeGroup] = 1;
    }
    const bool tie = kDialect != SignDialect::kGlobal || !work.again;
    const bool elects_plus = vote[i] > 0 || (vote[i] == 0 && tie);
    const S sum = elects_plus ? plus[i] : minus[i];
    S share = elects_plus ? plus_share[i] : minus_share[i];
    if (share == 0) share = 1;
    const S merged = start[i] + static_cast<S>(work.scale) * (sum / share);
    narrow(vote[i] == vote[i] ? merged : vote[i], result.value[i]);
  }
  memory.template target<Pack>()[first] = result;
}

template <class Memory>
NLM_DEVICE bool wanted(const MergeGrid& work, int64_t entry, const Memory& memory) {
  return !work.again || memory.contested()[entry / kSignMergeGroup] != 0;
}

template <class T, SignDialect kDialect, class Memory>
NLM_DEVICE void merge_phase(const MergeGrid& work, int64_t block, int thread,
                            const Memory& memory) {
  constexpr int kPack = kMergePack<T>;
  ThreadBallot ballot = 0;
  const int64_t first = block * kBlockThreads * kPacksPerThread + thread;
  for (int p = 0; p < kPacksPerThread; ++p) {
    const int64_t at = first + static_cast<int64_t>(p) * kBlockThreads;
    if (at < work.packs && wanted(work, at * kPack, memory)) {
      merge_pack<T, kPack, kDialect>(work, at, memory, ballot);
    }
    const int64_t single = work.packs * kPack + at;
    if (single < work.size && wanted(work, single, memory)) {
      merge_pack<T, 1, kDialect>(work, single, memory, ballot);
    }
  }
  if constexpr (kDialect == SignDialect::kGlobal) {
    const int signs = static_cast<int16_t>(ballot & 0xffff);
    const int contested = (ballot - signs) >> 16;
    if (signs != 0) memory.add_shared(0, signs);
    if (contested != 0) memory.add_shared(1, contested);
  }
}

template <class Memory>
NLM_DEVICE void close_phase(int thread, const Memory& memory) {
  if (thread < 2 && memory.shared(thread) != 0) memory.add_ballot(thread, memory.shared(thread));
}

}  // namespace nlm::NLM_ISA
