// Short runs of elements of any type, in the type that they are computed in.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace nlm::NLM_ISA {

// use(i, vector) for the vectors of `n` elements, the last of which is filled up with zeros; what
// lies `ahead` elements further on is fetched meanwhile.
template <class T, class Use>
NLM_INLINE void for_vectors(const T* x, int64_t n, int64_t ahead, const Use& use) {
  constexpr int kLanes = Lanes<T>::count;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(x + i + ahead);
    use(i, load(x + i));
  }
  if (i < n) use(i, load_first(x + i, n - i));
}

// `n` elements from `first` on as S: float, where none is float64, or double. They stay where they
// are if they are stored so, and else go to `buffer`.
template <class S>
inline const S* widened(const void* data, DType dtype, int64_t first, int64_t n, S* buffer) {
  const S* result = buffer;
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const T* source = static_cast<const T*>(data) + first;
    if constexpr (std::is_same_v<T, S>) {
      result = source;
    } else if constexpr (std::is_same_v<typename Lanes<T>::scalar, S>) {
      int64_t i = 0;
      for (; i + Lanes<T>::count <= n; i += Lanes<T>::count) store(buffer + i, load(source + i));
      if (i < n) store_first(buffer + i, load_first(source + i, n - i), n - i);
    } else {
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<S>(load_one(source + i));
    }
  });
  return result;
}

// Writes `n` results to `target` from `first` on, rounded to its type.
template <class S>
inline void narrowed(const S* values, int64_t n, void* target, DType dtype, int64_t first) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    T* end = static_cast<T*>(target) + first;
    for (int64_t i = 0; i < n; ++i) {
      store_one(end + i, static_cast<typename Lanes<T>::scalar>(values[i]));
    }
  });
}

}  // namespace nlm::NLM_ISA
