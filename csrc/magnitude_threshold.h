// The k-th largest |values - base| of a list of tensors, without a sort. See
// magnitude_threshold.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

// One tensor of the list, packed; null `base` is zero. The difference is taken in float32, or in
// float64 where one of the two is stored so.
struct MagnitudeItem {
  const void* values;
  const void* base;
  DType dtype, base_dtype;
  int64_t size;
};

// *result, float64 if `result_dtype` is, else float32, becomes the rank-th largest (1 is the
// largest) of all items' magnitudes. NaN is larger than all others. 1 <= rank <= sum of the sizes;
// no item is float64 where the result is float32.
NLM_KERNEL(void, magnitude_threshold,
           (const MagnitudeItem* items, int64_t count, int64_t rank, DType result_dtype,
            void* result, int threads));

// The same on the GPU (magnitude_threshold.cu): device pointers, launched on `stream`, a
// cudaStream_t. An item's base has its type, which is 16-bit or float32, or float64 where the
// result is. `scratch` is magnitude_threshold_scratch() zeroed bytes. The result is a cudaError_t;
// nothing is waited for or allocated.
int64_t magnitude_threshold_scratch();
int magnitude_threshold_cuda(const MagnitudeItem* items, int64_t count, int64_t rank,
                             DType result_dtype, void* result, void* scratch, void* stream);

}  // namespace nlm
