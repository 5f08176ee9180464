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

// For products that go to BLAS. Batch e, terms [begin, end) of an operand in float32 (float64 for
// float64): target[rows, end - begin], or [end - begin, rows] where `transposed`.
NLM_KERNEL(void, similarity_gather,
           (const SimilarityOperand& operand, DType dtype, int64_t e, int64_t begin, int64_t end,
            bool transposed, void* target, int threads));

// out(e, i, j) += weight * product[i, j] for rows [begin, end) of batch e; `product` begins with
// the first of them, and is of float64 where `wide`, else of float32.
NLM_KERNEL(void, similarity_add,
           (const SimilarityOut& out, int64_t e, int64_t begin, int64_t end, int64_t columns,
            const void* product, bool wide, double weight, int threads));

}  // namespace nlm
