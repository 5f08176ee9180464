// Magnitudes as integers in the same order: of numbers that are not negative the bits are in the
// order of the numbers, and NaN is above all of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/blocks.h"
#include "core/simd.h"
#include "magnitude_threshold.h"

namespace nlm::NLM_ISA {

inline constexpr int64_t kMagnitudeBlock =
    1024;  // values that are worked on in the first-level cache

// The integers that order the magnitudes of S.
template <class S>
struct Order {
  using bits = int32_t;
  using vector = vint32;
  static constexpr bits kMost = INT32_MAX, kLeast = INT32_MIN, kInfinity = 0x7f800000;
};
template <>
struct Order<double> {
  using bits = int64_t;
  using vector = vint64;
  static constexpr bits kMost = INT64_MAX, kLeast = INT64_MIN, kInfinity = 0x7ff0000000000000;
};
template <class S>
using Bits = typename Order<S>::bits;

template <class T, class B>
NLM_INLINE void magnitudes_of(const T* values, const T* base, int64_t n, B* bits) {
  using V = typename Order<typename Lanes<T>::scalar>::vector;
  constexpr B kMagnitude = Order<typename Lanes<T>::scalar>::kMost;
  for (int64_t i = 0; i < n; i += Lanes<T>::count) {
    const int64_t left = n - i;
    const bool full = left >= Lanes<T>::count;
    auto value = full ? load(values + i) : load_first(values + i, left);
    if (base != nullptr) value = value - (full ? load(base + i) : load_first(base + i, left));
    const V magnitude = (V)value & kMagnitude;
    std::memcpy(bits + i, &magnitude, sizeof magnitude);
  }
}

// The same in the order of S, which may be wider than the type that T is computed in.
template <class S, class T>
NLM_INLINE void ordered(const T* values, const T* base, int64_t n, Bits<S>* bits) {
  using P = typename Lanes<T>::scalar;
  if constexpr (std::is_same_v<P, S>) {
    magnitudes_of(values, base, n, bits);
  } else if constexpr (sizeof(P) < sizeof(S)) {
    Bits<P> narrow[kMagnitudeBlock];
    magnitudes_of(values, base, n, narrow);
    for (int64_t i = 0; i < n; ++i) {
      P value;
      std::memcpy(&value, narrow + i, sizeof value);
      const S wide = value;
      std::memcpy(bits + i, &wide, sizeof wide);
    }
  }
}

template <class S, class P>
NLM_INLINE void ordered_as(const MagnitudeItem& item, int64_t first, int64_t n, Bits<S>* bits) {
  P values[kMagnitudeBlock], base[kMagnitudeBlock];
  ordered<S>(widened(item.values, item.dtype, first, n, values),
             widened(item.base, item.base_dtype, first, n, base), n, bits);
}

// The magnitudes of n <= kMagnitudeBlock values of an item from `first` on. `bits` has room for
// whole vectors; its lanes behind the n-th are below all values.
template <class S>
void load_magnitudes(const MagnitudeItem& item, int64_t first, int64_t n, Bits<S>* bits) {
  if (item.base == nullptr || item.dtype == item.base_dtype) {
    with_dtype(item.dtype, [&](auto type) {
      using T = decltype(type);
      const T* base = static_cast<const T*>(item.base);
      ordered<S>(static_cast<const T*>(item.values) + first, base ? base + first : base, n, bits);
    });
  } else if (item.dtype == DType::kFloat64 || item.base_dtype == DType::kFloat64) {
    ordered_as<S, double>(item, first, n, bits);
  } else {
    ordered_as<S, float>(item, first, n, bits);
  }
  for (; n % Lanes<S>::count != 0; ++n) bits[n] = Order<S>::kLeast;
}

}  // namespace nlm::NLM_ISA
