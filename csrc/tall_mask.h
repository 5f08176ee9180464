// Masks of the entries of a merge that a task lives in, eight to a byte: entry i is bit i % 8, from
// the lowest, of byte i / 8. See tall_mask.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

inline constexpr int64_t kMostMasks = 255;  // their number is counted in eight bits

// Bit i of `mask` is |expert[i] - base[i]| > limit |expert[i] - merged[i]|, of `count` elements
// each; the bits behind the last are zero.
NLM_KERNEL(void, tall_mask,
           (const void* expert, const void* base, const void* merged, DType dtype, int64_t count,
            double limit, uint8_t* mask, int threads));

// out[i] = merged[i] where bit i of `mask` is set, else base[i]; elements of 2, 4 or 8 bytes.
NLM_KERNEL(void, tall_mask_apply,
           (const uint8_t* mask, const void* base, const void* merged, int element_bytes,
            int64_t count, void* out, int threads));

// A bit of `kept` is set where at least `least` of the masks[tasks, bytes] have it, 1 <= least;
// *count is how many are. 1 <= tasks <= kMostMasks.
NLM_KERNEL(void, tall_mask_agreement,
           (const uint8_t* masks, int64_t tasks, int64_t bytes, int64_t least, uint8_t* kept,
            int64_t* count, int threads));

// The same on the GPU (tall_mask.cu): device pointers, launched on `stream`, a cudaStream_t. The
// result is a cudaError_t. Nothing is waited for or allocated.
int tall_mask_cuda(const void* expert, const void* base, const void* merged, DType dtype,
                   int64_t count, double limit, uint8_t* mask, void* stream);
int tall_mask_apply_cuda(const uint8_t* mask, const void* base, const void* merged,
                         int element_bytes, int64_t count, void* out, void* stream);

// The sum of counts[tall_mask_walks(bytes)] is the count.
int64_t tall_mask_walks(int64_t bytes);
int tall_mask_agreement_cuda(const uint8_t* masks, int64_t tasks, int64_t bytes, int64_t least,
                             uint8_t* kept, int64_t* counts, void* stream);

}  // namespace nlm
