// Transposes a square of vectors in registers.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

namespace nlm::NLM_ISA {

// {a0, b0, a1, b1, ...}: the lower (kHalf = 0) or upper (kHalf = 1) halves of a and b, interleaved.
template <int kHalf, class V, int... kLane>
NLM_INLINE V interleave(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kHalf * kCount / 2 + kLane / 2 + kLane % 2 * kCount)...);
#else
  using Index = std::conditional_t<sizeof(V) / kCount == 8, vint64, vint32>;
  return __builtin_shuffle(a, b, Index{(kHalf * kCount / 2 + kLane / 2 + kLane % 2 * kCount)...});
#endif
}

// rows[i][j] becomes rows[j][i]. One step interleaves row i with row i + kCount / 2, which rotates
// the bits of the index (row, lane) by one place; log2(kCount) steps swap row and lane.
template <class V, int kCount>
NLM_INLINE void transpose(V (&rows)[kCount]) {
  constexpr auto kLanes = std::make_integer_sequence<int, kCount>{};
  for (int step = 1; step < kCount; step *= 2) {
    V mixed[kCount];
    for (int i = 0; i < kCount / 2; ++i) {
      mixed[2 * i] = interleave<0>(rows[i], rows[i + kCount / 2], kLanes);
      mixed[2 * i + 1] = interleave<1>(rows[i], rows[i + kCount / 2], kLanes);
    }
    for (int i = 0; i < kCount; ++i) rows[i] = mixed[i];
  }
}

}  // namespace nlm::NLM_ISA
