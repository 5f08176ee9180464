// The linear assignment problem, exact and batched. See assignment.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

// All of [batch, n], packed. `columns` and `column_duals` hold a start where `warm`: an assignment
// (a column that is out of range or taken leaves its row free) and finite duals.
struct Assignment {
  int64_t* columns;
  double* row_duals;
  double* column_duals;
  bool warm;
};

// costs[batch, row, column] in float32 or float64, columns contiguous, n < 2^31. False, and no
// result, where a cost is not finite or so large that a sum of squares overflows (1e150 is not).
NLM_KERNEL(bool, assignment,
           (const View3& costs, bool maximize, const Assignment& result, int threads));

}  // namespace nlm
