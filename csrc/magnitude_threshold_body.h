// The CUDA kernels' work on one (block, thread); tests run the same code over the grid on the CPU.
//
// A radix selection on the bits of the magnitudes (csrc/magnitude_order.h says why bits), from the
// highest digit of 11 bits down. The counting kernel reads every value once and counts the digits
// of those whose higher digits are the result's: in shared memory, then into the state. The picking
// kernel, one block, finds the digit that holds the rank. Integer sums: the same bits on every run.
//
// Each kernel is cut into phases at its barriers; a phase may run its threads one after another.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/device.h"
#include "magnitude_threshold.h"

namespace nlm::NLM_ISA {

inline constexpr int kDigitBits = 11;
inline constexpr int kDigits = 1 << kDigitBits;
inline constexpr int kSpans = 80;  // tensors of one launch, which takes them by value

// A tensor, and the first of the blocks that share it.
struct MagnitudeSpan {
  const void* values;
  const void* base;  // null: zero
  int64_t size;
  int64_t first_block;
  bool packs;  // addresses allow 16-byte words
};

struct Digit {
  int shift, bits;
};

struct CountGrid {
  MagnitudeSpan spans[kSpans];
  int count;
  int64_t chunk;  // values of a block
  Digit digit;
};

struct PickGrid {
  Digit digit;
  bool first;
  uint64_t rank;  // of the whole list, where this is the first digit
};

// What is known of the result; zero at first.
struct MagnitudeState {
  uint64_t rank;    // among the values that begin with the prefix
  uint64_t prefix;  // digits known so far, in place
  unsigned long long counts[kDigits];
};

NLM_DEVICE uint64_t bits_of_double(double value) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(value));
#else
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}
NLM_DEVICE double double_of_bits(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Word is uint32_t for a float32 result, uint64_t for a float64 one.
template <class Word, class S>
NLM_DEVICE Word magnitude(S difference) {
  if constexpr (sizeof(Word) == 4) {
    return bits_of_float(difference) & 0x7fffffffu;
  } else {
    return bits_of_double(static_cast<double>(difference)) & 0x7fffffffffffffffu;
  }
}

NLM_DEVICE const MagnitudeSpan& span_of(const CountGrid& work, int64_t block, int& index) {
  int low = 0;
  for (int above = work.count; above - low > 1;) {
    const int half = (low + above) / 2;
    (work.spans[half].first_block <= block ? low : above) = half;
  }
  index = low;
  return work.spans[low];
}

template <class Memory>
NLM_DEVICE void clear_phase(int thread, const Memory& memory) {
  for (int d = thread; d < kDigits; d += kBlockThreads) memory.digit(d) = 0;
}

template <class T, class Word, class Memory>
NLM_DEVICE void count_phase(const CountGrid& work, int64_t block, int thread,
                            const Memory& memory) {
  constexpr int kPack = 16 / sizeof(T);
  using Values = Pack<T, kPack>;
  int index = 0;
  const MagnitudeSpan& span = span_of(work, block, index);
  const Digit digit = work.digit;
  const Word known = static_cast<Word>(memory.prefix() >> digit.shift >> digit.bits);
  const auto add = [&](T value, T base, bool based) {
    const auto x = widen(value);
    const Word bits = magnitude<Word>(based ? x - widen(base) : x);
    if (static_cast<Word>(bits >> digit.shift >> digit.bits) == known) {
      memory.count(static_cast<int>(bits >> digit.shift) & ((1 << digit.bits) - 1));
    }
  };
  const bool based = span.base != nullptr;
  const int64_t begin = (block - span.first_block) * work.chunk;
  const int64_t end = begin + work.chunk < span.size ? begin + work.chunk : span.size;
  int64_t single = begin;  // from here on one value at a time
  if (span.packs) {
    const auto values = memory.template values<Values>(index);
    const auto base = memory.template base<Values>(index);
    single = begin + (end - begin) / kPack * kPack;
    for (int64_t p = begin / kPack + thread; p < single / kPack; p += kBlockThreads) {
      const Values x = values[p];
      const Values b = based ? base[p] : Values{};
      for (int i = 0; i < kPack; ++i) add(x.value[i], b.value[i], based);
    }
  }
  const auto values = memory.template values<T>(index);
  const auto base = memory.template base<T>(index);
  for (int64_t i = single + thread; i < end; i += kBlockThreads) {
    add(values[i], based ? base[i] : T{}, based);
  }
}

template <class Memory>
NLM_DEVICE void flush_phase(int thread, const Memory& memory) {
  for (int d = thread; d < kDigits; d += kBlockThreads) {
    const uint32_t count = memory.digit(d);
    if (count != 0) memory.add(d, count);
  }
}

// Sums of neighbouring digits, kDigits / kBlockThreads for each thread.
template <class Memory>
NLM_DEVICE void group_phase(int thread, const Memory& memory) {
  constexpr int kGroup = kDigits / kBlockThreads;
  uint64_t sum = 0;
  for (int i = 0; i < kGroup; ++i) sum += memory.total(thread * kGroup + i);
  memory.group(thread) = sum;
}

template <class Word, class Memory>
NLM_DEVICE void pick_phase(const PickGrid& work, int thread, const Memory& memory) {
  constexpr int kGroup = kDigits / kBlockThreads;
  if (thread != 0) return;
  uint64_t rank = work.first ? work.rank : memory.rank();
  int group = kBlockThreads - 1;
  for (; group > 0 && rank > memory.group(group); --group) rank -= memory.group(group);
  int digit = group * kGroup + kGroup - 1;
  for (; digit > group * kGroup && rank > memory.total(digit); --digit) rank -= memory.total(digit);
  const uint64_t bits = memory.prefix() | static_cast<uint64_t>(digit) << work.digit.shift;
  memory.rank() = rank;
  memory.prefix() = bits;
  if (work.digit.shift > 0) return;
  if constexpr (sizeof(Word) == 4) {
    const bool is_nan = bits > 0x7f800000u;
    memory.template result<float>()[0] =
        float_of_bits(is_nan ? 0x7fc00000u : static_cast<uint32_t>(bits));
  } else {
    const bool is_nan = bits > 0x7ff0000000000000u;
    memory.template result<double>()[0] = double_of_bits(is_nan ? 0x7ff8000000000000u : bits);
  }
}

// For the next digit.
template <class Memory>
NLM_DEVICE void forget_phase(int thread, const Memory& memory) {
  for (int d = thread; d < kDigits; d += kBlockThreads) memory.total(d) = 0;
}

// The launches of one selection: launch.template count<T, Word>(grid, blocks) for up to kSpans
// tensors of one type, launch.template pick<Word>(grid) after all tensors are counted.
template <class Word, class Launch>
int select_magnitude(const MagnitudeItem* items, int64_t count, int64_t rank,
                     const Launch& launch) {
  constexpr int kLeast = 16 * kBlockThreads, kMost = 32 * kLeast;
  int64_t size = 0;
  for (int64_t t = 0; t < count; ++t) size += items[t].size;
  int64_t chunk = kLeast;
  while (chunk < kMost && chunk * 2048 < size) chunk *= 2;
  int error = 0;
  const auto count_all = [&](auto type, DType dtype, CountGrid& work) {
    using T = decltype(type);
    int64_t blocks = 0;
    work.count = 0;
    for (int64_t t = 0; t <= count && error == 0; ++t) {
      if (work.count > 0 && (t == count || work.count == kSpans)) {
        error = launch.template count<T, Word>(work, blocks);
        work.count = 0;
        blocks = 0;
      }
      if (t == count || items[t].dtype != dtype || items[t].size == 0) continue;
      const auto address =
          reinterpret_cast<uintptr_t>(items[t].values) | reinterpret_cast<uintptr_t>(items[t].base);
      work.spans[work.count++] = {items[t].values, items[t].base, items[t].size, blocks,
                                  address % 16 == 0};
      blocks += (items[t].size + chunk - 1) / chunk;
    }
  };
  int shift = 8 * static_cast<int>(sizeof(Word)) - 1;
  for (bool first = true; shift > 0 && error == 0; first = false) {
    const int bits = shift % 10 == 0 ? 10 : kDigitBits;  // 31 = 11 + 10 + 10, 63 = 3 x (11 + 10)
    shift -= bits;
    CountGrid work = {};
    work.chunk = chunk;
    work.digit = {shift, bits};
    count_all(DeviceFloat16{}, DType::kFloat16, work);
    count_all(DeviceBFloat16{}, DType::kBFloat16, work);
    count_all(float{}, DType::kFloat32, work);
    if constexpr (sizeof(Word) == 8) count_all(double{}, DType::kFloat64, work);
    if (error == 0) {
      error = launch.template pick<Word>({{shift, bits}, first, static_cast<uint64_t>(rank)});
    }
  }
  return error;
}

}  // namespace nlm::NLM_ISA
