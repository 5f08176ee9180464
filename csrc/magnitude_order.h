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

template <class S>
using BitsVector = typename Order<S>::vector;

// sink(vector) for the magnitudes of n values, vector by vector. In the last one the lanes behind
// the n-th value are below all magnitudes.
template <class T, bool kBased, class Sink>
NLM_INLINE void feed(const T* values, const T* base, int64_t n, Sink& sink) {
  using S = typename Lanes<T>::scalar;
  using V = BitsVector<S>;
  constexpr Bits<S> kMagnitude = Order<S>::kMost;
  int64_t i = 0;
  for (; i + Lanes<T>::count <= n; i += Lanes<T>::count) {
    auto value = load(values + i);
    if constexpr (kBased) value = value - load(base + i);
    sink((V)value & kMagnitude);
  }
  if (i == n) return;
  auto value = load_first(values + i, n - i);
  if constexpr (kBased) value = value - load_first(base + i, n - i);
  V magnitude = (V)value & kMagnitude;
  for (int64_t lane = n - i; lane < Lanes<T>::count; ++lane) magnitude[lane] = Order<S>::kLeast;
  sink(magnitude);
}

template <class T, class Sink>
void feed(const T* values, const T* base, int64_t n, Sink& sink) {
  base != nullptr ? feed<T, true>(values, base, n, sink) : feed<T, false>(values, base, n, sink);
}

// A sink that writes whole vectors.
template <class S>
struct StoreMagnitudes {
  Bits<S>* next;
  NLM_INLINE void operator()(BitsVector<S> magnitude) {
    std::memcpy(next, &magnitude, sizeof magnitude);
    next += Lanes<S>::count;
  }
};

// Magnitudes of n <= kMagnitudeBlock pairs that are computed in P, in the order of S.
template <class S, class P, class Sink>
void feed_widened(const MagnitudeItem& item, int64_t first, int64_t n, Sink& sink) {
  P x[kMagnitudeBlock], b[kMagnitudeBlock];
  const P* values = widened(item.values, item.dtype, first, n, x);
  const P* base = item.base ? widened(item.base, item.base_dtype, first, n, b) : nullptr;
  if constexpr (std::is_same_v<S, P>) {
    feed(values, base, n, sink);
  } else {  // a difference that is rounded to float32, among float64 ones
    S wide[kMagnitudeBlock];
    for (int64_t i = 0; i < n; ++i) wide[i] = base ? values[i] - base[i] : values[i];
    feed<S, false>(wide, nullptr, n, sink);
  }
}

// sink(vector) for the magnitudes of n values of an item from `first` on, in the order of S. Lanes
// without a value, at the end of a run, are below all magnitudes.
template <class S, class Sink>
void for_magnitudes(const MagnitudeItem& item, int64_t first, int64_t n, Sink& sink) {
  bool done = false;
  if (item.base == nullptr || item.dtype == item.base_dtype) {
    with_dtype(item.dtype, [&](auto type) {
      using T = decltype(type);
      if constexpr (std::is_same_v<typename Lanes<T>::scalar, S>) {
        const T* base = static_cast<const T*>(item.base);
        feed(static_cast<const T*>(item.values) + first, base ? base + first : base, n, sink);
        done = true;
      }
    });
  }
  const bool wide =
      item.dtype == DType::kFloat64 || (item.base != nullptr && item.base_dtype == DType::kFloat64);
  for (int64_t i = 0; i < n && !done; i += kMagnitudeBlock) {
    const int64_t length = n - i < kMagnitudeBlock ? n - i : kMagnitudeBlock;
    if (wide) {
      if constexpr (std::is_same_v<S, double>)
        feed_widened<S, double>(item, first + i, length, sink);
    } else {
      feed_widened<S, float>(item, first + i, length, sink);
    }
  }
}

}  // namespace nlm::NLM_ISA
