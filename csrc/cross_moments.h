// Adds a batch to the running joint moments of two streams of channels.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/view.h"

namespace nlm {

// count; mean and sum of squared deviations per channel of x [cx] and of y [cy]; and
// comoment [cx, cy] = sum (x - mean_x)(y - mean_y)^T, row-major. The y pointers are null when the
// same stream is taken twice; comoment is then symmetric, with m2_x on its diagonal.
struct CrossMomentsState {
  int64_t* count;
  double* mean_x;
  double* m2_x;
  double* mean_y;
  double* m2_y;
  double* comoment;
};

// The least that a product keeps of float32 deviations; more where nothing is gained by less. Its
// values are those of nlm/ops/cross_moments.py.
enum class Precision : int { kFloat32 = 0, kBFloat16x3 = 1, kBFloat16 = 2 };

// `y` is null for the same stream twice; else it has x's dtype, outer and inner sizes.
NLM_KERNEL_AMX(void, cross_moments,
               (const View3& x, const View3* y, const Mask2& mask, Precision precision,
                const CrossMomentsState& state, int threads));

}  // namespace nlm
