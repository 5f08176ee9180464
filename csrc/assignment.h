// The linear assignment problem, exact and batched. See assignment.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

// All of [groups, batch, n], packed. `columns` and `column_duals` hold a start where `warm`: an
// assignment (a column that is out of range or taken leaves its row free) and finite duals.
// `changed`, null or [groups, batch, n], marks the rows whose costs the start may not know: all
// others are as they were when the start, with its finite row duals, was solved, and are read only
// where a path needs them.
struct Assignment {
  int64_t* columns;
  double* row_duals;
  double* column_duals;
  bool warm;
  const uint8_t* changed;
};

// costs[group, batch, row, column] in float32 or float64, columns contiguous, n < 2^31: a view of
// the first of `groups`, which lie `group_stride` entries apart. False, and no result, where a cost
// is not finite or so large that a sum of squares overflows (1e150 is not).
NLM_KERNEL(bool, assignment,
           (const View3& costs, int64_t groups, int64_t group_stride, bool maximize,
            const Assignment& result, int threads));

}  // namespace nlm
