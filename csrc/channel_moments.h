// Count, mean and sum of squared deviations per channel, in one read. See channel_moments.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

// count[0], mean[C] and m2[C] are overwritten. `mask` is over [outer, inner].
NLM_KERNEL(void, channel_moments,
           (const View3& x, const Mask2& mask, int64_t* count, double* mean, double* m2,
            int threads));

}  // namespace nlm
