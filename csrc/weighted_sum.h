// The weighted sum of tensors, or of their differences from a base. See weighted_sum.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

inline constexpr int kWeightedSumTensors = 128;

// target = base + scale * (sum_k weight_k (tensor_k - base) / divisor), without base where that is
// null, and the base as it is where there are no tensors. Computed in float32, in float64 where the
// base or a tensor is, and rounded to the target's type once. All are packed and have `size`
// elements; `target` overlaps none.
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
