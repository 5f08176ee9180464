// Drops entries of a task vector at random and rescales the others. See dare.cpp.
#pragma once

#include "core/philox_constants.h"
#include "core/view.h"

namespace nlm {

// Entry i has position offset + i, 0 <= offset. Word position % 4 of Philox4x32-10 of the counter
// (position / 4, 0) and the key `seed`, both with their lower 32 bits first, is its random number;
// it is dropped where that is below `threshold`.
struct Drop {
  uint64_t seed;
  int64_t offset;
  uint32_t threshold;
  double scale;
};

// out[i] = base[i] where entry i is dropped, else base[i] + scale * (expert[i] - base[i]).
NLM_KERNEL(void, dare,
           (const void* expert, const void* base, void* out, DType dtype, int64_t count,
            const Drop& drop, int threads));

// The same on the GPU (dare.cu): device pointers, launched on `stream`, a cudaStream_t. The result
// is a cudaError_t. Nothing is waited for or allocated.
int dare_cuda(const void* expert, const void* base, void* out, DType dtype, int64_t count,
              const Drop& drop, void* stream);

}  // namespace nlm
