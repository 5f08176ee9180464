// Gathers axes of a list of tensors, and copies the result or adds a multiple of it.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/view.h"

namespace nlm {

inline constexpr int kPermuteMaxAxes = 16;

// One axis of a tensor. Where `index` is not null it is a contiguous array
// [size of parents[0], ..., size of parents[parent_count - 1], size], every value in [0, size), and
// output position i of this axis reads source position index[i_parents..., i]; else it reads i.
struct PermuteAxis {
  int64_t size;
  int64_t stride;  // of the source, in elements
  const int64_t* index;
  int parent_count;
  int parents[kPermuteMaxAxes];
};

// One tensor: `target` is contiguous in the order of the axes, and does not overlap a source.
struct PermuteItem {
  const void* source;
  void* target;
  int axis_count;
  PermuteAxis axes[kPermuteMaxAxes];
};

// target = gathered source; elements of 1, 2, 4, 8 or 16 bytes, element_bytes[item].
NLM_KERNEL(void, permute,
           (const PermuteItem* items, const int* element_bytes, int64_t count, int threads));

// target += weight[item] * gathered source, in float32 (float64 for float64), rounded after the
// product and after the sum.
NLM_KERNEL(void, permute_add,
           (const PermuteItem* items, const DType* dtypes, const double* weights, int64_t count,
            int threads));

// The same on the GPU (permute.cu): device pointers, launched on `stream`, a cudaStream_t. The
// result is a cudaError_t. Nothing is waited for or allocated.
int permute_cuda(const PermuteItem* items, const int* element_bytes, int64_t count, void* stream);
int permute_add_cuda(const PermuteItem* items, const DType* dtypes, const double* weights,
                     int64_t count, void* stream);

}  // namespace nlm
