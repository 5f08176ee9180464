// Drops entries of rows at random, the smaller ones more often. See magprune.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

// The chances of so many ranks, from the smallest entry on: the word of rank r is dropped where it
// is below least[r], else its entry is multiplied by factors[r].
struct RankChances {
  const uint32_t* least;
  const double* factors;
};

// x[rows, length], packed, length < 2^32 between segments: a row is cut into segments of `segment`
// entries, the last of which may be shorter, and each is ranked by itself. The words of a segment
// that begins at entry i of x are those of positions offset + i + rank, as dare.h has them.
struct RankedRows {
  const void* x;
  void* out;  // overlaps nothing
  DType dtype;
  int64_t rows, length, segment;
  int64_t offset;
  uint64_t seed;
  RankChances whole, last;  // of segments, and of the last one of a row
};

NLM_KERNEL(void, magprune, (const RankedRows& work, int threads));

}  // namespace nlm
