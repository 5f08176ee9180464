// Adds the products of the rows of two gathered tensors to a matrix.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/view.h"

namespace nlm {

// A tensor as `batches` matrices [rows, terms], by offsets in elements: entry (e, i, k) is
// data[batch[e] + row[i] + term[e * term_step + k]].
struct SimilarityOperand {
  const void* data;
  const int64_t* batch;
  const int64_t* row;
  const int64_t* term;
  int64_t rows;
  int64_t term_step;  // 0 where all batches have the same terms
};

// out[batch[e] + row[i] + column[j]], no two of them the same.
struct SimilarityOut {
  double* data;
  const int64_t* batch;
  const int64_t* row;
  const int64_t* column;
};

// out(e, i, j) += weight * sum_k a(e, i, k) b(e, j, k). Both operands are of type `dtype`.
NLM_KERNEL(void, group_similarity,
           (const SimilarityOperand& a, const SimilarityOperand& b, const SimilarityOut& out,
            DType dtype, int64_t batches, int64_t terms, double weight, int threads));

}  // namespace nlm
