// magnitude_threshold's and sign_merge's kernels over their grids; part of grid_emulation.cpp,
// whose bounds-checked memory it uses. A kernel's phases run one after another, each over all
// threads.
#pragma once

#include "magnitude_threshold_body.h"
#include "sign_merge_body.h"

namespace {

// Of what one call may touch: per item its values and its base; the result and the state.
struct MagnitudeRanges {
  const Range* items;
  Range result, state;
};

struct CountMemory {
  const CountGrid& work;
  const MagnitudeRanges& ranges;
  MagnitudeState* state;
  uint32_t* digits;

  // The range that holds the address: spans are regrouped by type.
  template <class T>
  Checked<const T> within(const void* data) const {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    for (const Range* range = ranges.items;; ++range) {
      if (range->begin == begin && range->begin != range->end)
        return checked<const T>(data, *range);
    }
  }
  template <class T>
  Checked<const T> values(int span) const {
    return within<T>(work.spans[span].values);
  }
  template <class T>
  Checked<const T> base(int span) const {
    const void* data = work.spans[span].base;
    return data == nullptr ? checked<const T>(data, {}) : within<T>(data);
  }
  uint64_t prefix() const { return state->prefix; }
  uint32_t& digit(int d) const { return digits[d]; }
  void count(int d) const { ++digits[d]; }
  void add(int d, uint32_t count) const {
    checked<unsigned long long>(state->counts, ranges.state)[d] += count;
  }
};

struct PickMemory {
  const MagnitudeRanges& ranges;
  MagnitudeState* state;
  uint64_t* groups;
  void* result_data;

  unsigned long long& total(int d) const {
    return checked<unsigned long long>(state->counts, ranges.state)[d];
  }
  uint64_t& group(int g) const { return groups[g]; }
  uint64_t& rank() const { return state->rank; }
  uint64_t& prefix() const { return state->prefix; }
  template <class T>
  Checked<T> result() const {
    return checked<T>(result_data, ranges.result);
  }
};

template <class Phase>
void all_threads(const Phase& phase) {
  for (int thread = 0; thread < kBlockThreads; ++thread) phase(thread);
}

struct SelectionLaunch {
  const MagnitudeRanges& ranges;
  MagnitudeState* state;
  void* result;
  int64_t first_block, end_block;  // of each launch

  template <class T, class Word>
  int count(const CountGrid& work, int64_t blocks) const {
    std::vector<uint32_t> digits(kDigits, 7);  // what shared memory holds at first is anything
    const CountMemory memory = {work, ranges, state, digits.data()};
    const int64_t first = first_block < 0 ? first_block + blocks : first_block;
    const int64_t end = end_block < 0 ? blocks : end_block;
    for (int64_t block = first; block < end; ++block) {
      all_threads([&](int thread) { clear_phase(thread, memory); });
      all_threads([&](int thread) { count_phase<T, Word>(work, block, thread, memory); });
      all_threads([&](int thread) { flush_phase(thread, memory); });
    }
    return 0;
  }
  template <class Word>
  int pick(const PickGrid& work) const {
    std::vector<uint64_t> groups(kBlockThreads, 7);
    const PickMemory memory = {ranges, state, groups.data(), result};
    all_threads([&](int thread) { group_phase(thread, memory); });
    all_threads([&](int thread) { pick_phase<Word>(work, thread, memory); });
    all_threads([&](int thread) { forget_phase(thread, memory); });
    return 0;
  }
};

struct SignMergeRanges {
  Range base, target, thresholds, ballot, contested;
  const Range* experts;
};

struct MergeMemory {
  const MergeGrid& work;
  const SignMergeRanges& ranges;
  int* counts;
  int64_t* ballot;

  template <class T>
  Checked<const T> base() const {
    return checked<const T>(work.base, ranges.base);
  }
  template <class T>
  Checked<const T> expert(int k) const {
    return checked<const T>(work.experts[k], ranges.experts[k]);
  }
  template <class T>
  Checked<const T> thresholds() const {
    return checked<const T>(work.thresholds, ranges.thresholds);
  }
  template <class T>
  Checked<T> target() const {
    return checked<T>(work.target, ranges.target);
  }
  Checked<uint8_t> contested() const { return checked<uint8_t>(work.contested, ranges.contested); }
  int& shared(int i) const { return counts[i]; }
  void add_shared(int i, int count) const { counts[i] += count; }
  void add_ballot(int i, int count) const { checked<int64_t>(ballot, ranges.ballot)[i] += count; }
};

template <class T, SignDialect kDialect>
int64_t run_merge(const SignMergeItem& item, int64_t* ballot, const SignMergeRanges& ranges,
                  int64_t first_block, int64_t end_block) {
  const MergeGrid work = make_merge_grid<T>(item);
  int counts[2];
  const MergeMemory memory = {work, ranges, counts, ballot};
  violations = 0;
  const int64_t blocks = merge_blocks(work, kMergePack<T>);
  if (first_block < 0) first_block += blocks;
  if (end_block < 0) end_block = blocks;
  for (int64_t block = first_block; block < end_block; ++block) {
    counts[0] = counts[1] = 7;
    all_threads([&](int thread) { open_phase(thread, memory); });
    all_threads([&](int thread) { merge_phase<T, kDialect>(work, block, thread, memory); });
    all_threads([&](int thread) { close_phase(thread, memory); });
  }
  return violations;
}

template <class T>
int64_t run_merge(const SignMergeItem& item, int64_t* ballot, const SignMergeRanges& ranges,
                  int64_t first_block, int64_t end_block) {
  switch (item.dialect) {
    case SignDialect::kGlobal:
      return run_merge<T, SignDialect::kGlobal>(item, ballot, ranges, first_block, end_block);
    case SignDialect::kMergekit:
    case SignDialect::kMergekitSum:
      return run_merge<T, SignDialect::kMergekit>(item, ballot, ranges, first_block, end_block);
    case SignDialect::kPeft:
      return run_merge<T, SignDialect::kPeft>(item, ballot, ranges, first_block, end_block);
  }
  return -1;
}

}  // namespace

extern "C" {

int64_t emulate_magnitude_state() { return sizeof(MagnitudeState); }

int64_t emulate_magnitude_threshold(const MagnitudeItem* items, int64_t count, int64_t rank,
                                    int result_dtype, void* result, void* state,
                                    const MagnitudeRanges* ranges, int64_t first_block,
                                    int64_t end_block) {
  violations = 0;
  const SelectionLaunch launch = {*ranges, static_cast<MagnitudeState*>(state), result, first_block,
                                  end_block};
  const int error = static_cast<DType>(result_dtype) == DType::kFloat64
                        ? select_magnitude<uint64_t>(items, count, rank, launch)
                        : select_magnitude<uint32_t>(items, count, rank, launch);
  return error != 0 ? -1 : violations;
}

int64_t emulate_sign_merge(const SignMergeItem* item, int64_t* ballot,
                           const SignMergeRanges* ranges, int64_t first_block, int64_t end_block) {
  switch (item->dtype) {
    case DType::kFloat16:
      return run_merge<DeviceFloat16>(*item, ballot, *ranges, first_block, end_block);
    case DType::kBFloat16:
      return run_merge<DeviceBFloat16>(*item, ballot, *ranges, first_block, end_block);
    case DType::kFloat32:
      return run_merge<float>(*item, ballot, *ranges, first_block, end_block);
    case DType::kFloat64:
      return run_merge<double>(*item, ballot, *ranges, first_block, end_block);
  }
  return -1;
}

}  // extern "C"
