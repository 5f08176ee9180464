// The inner products of tensors, or of their differences from a base. See inner_products.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

inline constexpr int kInnerProductsTensors = 128;

// All tensors are packed and have `size` elements.
struct VectorSet {
  const void* base;  // or null
  DType base_dtype;
  const PackedTensor* tensors;
  int count;  // 1 to kInnerProductsTensors
  int64_t size;
};

// products[i * count + j] becomes the inner product of vectors i and j.
NLM_KERNEL(void, inner_products, (const VectorSet& set, double* products, int threads));

// The same on the GPU (inner_products.cu): device pointers but for set.tensors, all tensors of the
// base type, launched on `stream`, a cudaStream_t. Of inner_products_rows matrices in `partial`,
// zeros before, the sum's upper triangle is the result. The value is a cudaError_t; nothing is
// waited for or allocated.
int64_t inner_products_rows(int64_t size, DType dtype);
int inner_products_cuda(const VectorSet& set, double* partial, void* stream);

}  // namespace nlm
