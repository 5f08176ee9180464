// How a tensor reaches a kernel: a raw pointer with 64-bit sizes and strides, counted in elements.
#pragma once

#include <cstdint>

#include "isa.h"

namespace nlm {

// The values are those of nlm/_native.py.
enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

// x of any rank with a channel dimension, as x[outer, channel, inner]. Strides may be 0 or
// negative.
struct View3 {
  void* data;
  DType dtype;
  int64_t outer, channels, inner;
  int64_t outer_stride, channel_stride, inner_stride;

  template <class T>
  NLM_INLINE T* at(int64_t o, int64_t c, int64_t i) const {
    return static_cast<T*>(data) + o * outer_stride + c * channel_stride + i * inner_stride;
  }
  bool empty() const { return outer == 0 || channels == 0 || inner == 0; }
};

// A packed tensor.
struct PackedTensor {
  const void* data;
  DType dtype;
};

// The same and its factor in a sum.
struct WeightedTensor {
  const void* data;
  DType dtype;
  double weight;
};

// A bool tensor as mask[outer, inner], one byte per entry; null `data` means that all count.
struct Mask2 {
  const uint8_t* data;
  int64_t outer_stride, inner_stride;

  NLM_INLINE bool counts(int64_t o, int64_t i) const {
    return data == nullptr || data[o * outer_stride + i * inner_stride] != 0;
  }
};

}  // namespace nlm
