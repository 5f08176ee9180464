// The weighted sum of tensors, or of their differences from a base. See weighted_sum.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

inline constexpr int kWeightedSumTensors = 128;

// All tensors are packed and have `size` elements; `target` overlaps none.
struct WeightedSum {
  const void* base;  // or null
  DType base_dtype;
  const WeightedTensor* tensors;
  int count;  // 0, with a base only, to kWeightedSumTensors
  double divisor, scale;
  void* target;
  DType target_dtype;
  int64_t size;
};

NLM_KERNEL(void, weighted_sum, (const WeightedSum& work, int threads));

// The same on the GPU (weighted_sum.cu): device pointers but for work.tensors, all tensors of the
// target's type, launched on `stream`, a cudaStream_t. The result is a cudaError_t; nothing is
// waited for or allocated.
int weighted_sum_cuda(const WeightedSum& work, void* stream);

}  // namespace nlm
