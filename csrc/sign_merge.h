// TIES' trimming, election and disjoint mean of experts against their base. See sign_merge.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

inline constexpr int kSignMergeExperts = 128;
inline constexpr int kSignMergeGroup = 64;  // entries of one byte of `contested`

// The values are those of nlm/ops/sign_merge.py.
enum class SignDialect : int { kGlobal = 0, kMergekit = 1, kPeft = 2, kMergekitSum = 3 };

// All tensors are packed and have `size` elements; `target` is of the base's type and overlaps
// none. `thresholds` are one for each expert, float64 where any tensor is, else float32. A vote of
// 0 elects +. In the global dialect `contested` becomes 1 for each group that has votes of 0 with
// entries kept, else 0; where `again` is set, these groups alone are merged, with such votes for -.
struct SignMergeItem {
  const void* base;
  void* target;
  DType dtype;
  int64_t size;
  const WeightedTensor* experts;
  int count;  // 1 to kSignMergeExperts
  const void* thresholds;
  double scale;
  SignDialect dialect;
  uint8_t* contested;
  bool again;
};

// ballot[0] becomes the sum of the signs of all votes, ballot[1] the number of votes that are 0
// with entries kept; both only in the global dialect, else 0. It is left alone where `again` is
// set.
NLM_KERNEL(void, sign_merge, (const SignMergeItem& item, int64_t* ballot, int threads));

// The same on the GPU (sign_merge.cu): device pointers but for item.experts, launched on `stream`,
// a cudaStream_t. All tensors have the base's type; `ballot` and `contested` are zero unless
// `again` is set. The result is a cudaError_t; nothing is waited for or allocated.
int sign_merge_cuda(const SignMergeItem& item, int64_t* ballot, void* stream);

}  // namespace nlm
