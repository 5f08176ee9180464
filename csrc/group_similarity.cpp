// The similarity of the units of two tensors: a matrix product A B^T of gathered operands.
//
// The product is cut into stripes of at most 1536 rows and columns and blocks of 1024 terms. A
// block of a stripe is packed into panels (core/product.h), which is where it is gathered; then the
// tiles of the pair of stripes are multiplied and added to the result. So the scratch memory is at
// most 13 MB, however large the tensors are. An operand is packed in one of three ways:
//   neighbouring rows (the units are the last axis): whole vectors, a slice of terms at a time;
//   neighbouring terms (the units are the first axis, nothing is gathered): squares of vectors,
//     transposed in registers;
//   anything else: element by element, a panel at a time, whose rows stay in the second-level
//     cache: 16 rows of 3072 are 192 KB.
// An element that is packed is multiplied with a whole stripe, so that a gather of 1 ns costs 7 %
// of the product at 768 units and less above.
#include "group_similarity.h"

#include "core/parallel.h"
#include "core/product.h"
#include "core/simd.h"
#include "core/transpose.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kBlock = 1024;      // terms
constexpr int64_t kStripe = 1536;     // rows of one operand; a multiple of kTile
constexpr int64_t kTileRows = 192;    // 192 x 1024 of A (768 KB) stay in the second-level cache
constexpr int64_t kFewTerms = 64;     // up to here the result's memory bounds the product
constexpr int64_t kSerial = 1 << 22;  // products below which threads cost more than they save

NLM_INLINE bool is_run(const int64_t* offset, int64_t n) {
  int64_t i = 1;
  while (i < n && offset[i] == offset[0] + i) ++i;
  return i == n;
}

// Panels of core/product.h for a block of a stripe.
template <class S>
struct Panels {
  static constexpr int64_t kLanes = Lanes<S>::count;
  S* values;
  int64_t channels, stride;

  S* panel(int64_t p) const { return values + p * stride; }
  int64_t count() const { return ceil_div(channels, kLanes); }

  static int64_t stride_of(int64_t terms) { return (smaller(terms, kBlock) | 1) * kLanes; }
  static int64_t size_of(int64_t rows, int64_t terms) {
    return ceil_div(smaller(rows, kStripe), kLanes) * stride_of(terms);
  }
};

// The part of an operand that is packed at once.
template <class T>
struct Part {
  const T* source;
  const int64_t* row;
  const int64_t* term;
  int64_t rows, terms;
};

// Terms [begin, end) of rows that are neighbours.
template <class T, class S>
void pack_vectors(const Part<T>& part, int64_t begin, int64_t end, const Panels<S>& panels) {
  constexpr int64_t kLanes = Panels<S>::kLanes;
  for (int64_t k = begin; k < end; ++k) {
    const T* source = part.source + part.row[0] + part.term[k];
    for (int64_t c = 0; c < part.rows; c += kLanes) {
      const int64_t left = part.rows - c;
      store(panels.panel(c / kLanes) + k * kLanes,
            left < kLanes ? load_first(source + c, left) : load(source + c));
    }
  }
}

// All terms of panel p.
template <class T, class S>
void pack_panel(const Part<T>& part, int64_t p, const Panels<S>& panels) {
  constexpr int64_t kLanes = Panels<S>::kLanes;
  const int64_t rows = smaller(kLanes, part.rows - p * kLanes);
  const T* row[kLanes];
  for (int64_t lane = 0; lane < rows; ++lane) {
    row[lane] = part.source + part.row[p * kLanes + lane];
  }
  for (int64_t k = 0; k < part.terms;) {
    S* target = panels.panel(p) + k * kLanes;
    const int64_t term = part.term[k];
    if (k + kLanes <= part.terms && is_run(part.term + k, kLanes)) {
      typename Lanes<T>::vector square[kLanes] = {};
      for (int64_t lane = 0; lane < rows; ++lane) square[lane] = load(row[lane] + term);
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) store(target + i * kLanes, square[i]);
      k += kLanes;
      continue;
    }
    if constexpr (std::is_same_v<T, S>) {
      for (int64_t lane = 0; lane < rows; ++lane) target[lane] = row[lane][term];
      for (int64_t lane = rows; lane < kLanes; ++lane) target[lane] = 0;
    } else {
      T narrow[kLanes] = {};
      for (int64_t lane = 0; lane < rows; ++lane) narrow[lane] = row[lane][term];
      store(target, load(narrow));
    }
    k += 1;
  }
}

template <class T, class S>
void pack(const Part<T>& part, int threads, const Panels<S>& panels) {
  if (part.rows > 1 && is_run(part.row, part.rows)) {
    parallel_for(ceil_div(part.terms, kSlice), threads, [&](int64_t task, int) {
      pack_vectors(part, task * kSlice, smaller((task + 1) * kSlice, part.terms), panels);
    });
  } else {
    parallel_for(panels.count(), threads,
                 [&](int64_t task, int) { pack_panel(part, task, panels); });
  }
}

// run[k]: how many offsets from the k-th on are those of neighbours.
NLM_INLINE void find_runs(const int64_t* offset, int64_t n, int64_t* run) {
  for (int64_t k = n - 1; k >= 0; --k) {
    run[k] = k + 1 < n && offset[k + 1] == offset[k] + 1 ? run[k + 1] + 1 : 1;
  }
}

// Adds weight * tile to the result, whose offsets `row` and `column` begin with the tile. Rows of
// the tile lie `stride` apart.
template <class S>
void add_tile(const S* tile, int64_t stride, double weight, int64_t rows, int64_t columns,
              double* out, const int64_t* row, const int64_t* column) {
  int64_t run[kTile];
  find_runs(column, columns, run);
  for (int64_t i = 0; i < rows; ++i) {
    const S* sums = tile + i * stride;
    for (int64_t j = 0; j < columns;) {
      double* target = out + row[i] + column[j];
      const int64_t n = run[j];
      for (int64_t x = 0; x < n; ++x) target[x] += weight * static_cast<double>(sums[j + x]);
      j += n;
    }
  }
}

// Adds the product of a pair of packed blocks to the result.
template <class S>
void multiply_panels(const Panels<S>& a, const Panels<S>& b, int64_t terms, double weight,
                     int threads, double* out, const int64_t* row, const int64_t* column) {
  constexpr int64_t kLanes = Panels<S>::kLanes;
  constexpr int64_t kColumns = kTile / kLanes;
  const int64_t column_tiles = ceil_div(b.count(), kColumns);
  // Of few terms the result's memory bounds the product: a task goes along whole rows of it.
  const bool few = terms <= kFewTerms;
  const int64_t rows = rows_per_tile<S>(few ? kLanes : kTileRows, a.count(), column_tiles, threads);
  const int64_t together = few ? column_tiles : 1;
  const auto add = [&](int64_t first_row, int64_t first_column) {
    const Region region = {first_row, smaller(first_row + rows, a.count()), first_column,
                           smaller(first_column + kColumns, b.count())};
    const int64_t i = first_row * kLanes, j = first_column * kLanes;
    const int64_t tile_rows = smaller(region.row_end * kLanes, a.channels) - i;
    const int64_t tile_columns = smaller(region.column_end * kLanes, b.channels) - j;
    for (int64_t r = 0; r < tile_rows; ++r) {
      for (int64_t c = 0; c < tile_columns; c += 64 / sizeof(double)) {
        __builtin_prefetch(out + row[i + r] + column[j + c], 1, 2);
      }
    }
    alignas(64) double tile[kTileRows * kTile];
    multiply_tile<S>(a, b, false, region, terms, tile);
    add_tile(tile, kTile, weight, tile_rows, tile_columns, out, row + i, column + j);
  };
  const int64_t tasks = ceil_div(a.count(), rows) * column_tiles / together;
  parallel_for(tasks, threads, [&](int64_t task, int) {
    for (int64_t t = task * together; t < (task + 1) * together; ++t) {
      add(t / column_tiles * rows, t % column_tiles * kColumns);
    }
  });
}

// One batch: the stripes and blocks in turn. `scratch` holds the panels of both operands.
template <class T>
void add_batch(const SimilarityOperand& a, const SimilarityOperand& b, const SimilarityOut& out,
               int64_t e, int64_t terms, double weight, int threads,
               typename Lanes<T>::scalar* scratch) {
  using S = typename Lanes<T>::scalar;
  const auto part_of = [&](const SimilarityOperand& operand, int64_t r, int64_t k) {
    const T* data = static_cast<const T*>(operand.data) + operand.batch[e];
    return Part<T>{data, operand.row + r, operand.term + e * operand.term_step + k,
                   smaller(kStripe, operand.rows - r), smaller(kBlock, terms - k)};
  };
  const int64_t stride = Panels<S>::stride_of(terms);
  S* const scratch_b = scratch + Panels<S>::size_of(a.rows, terms);
  for (int64_t k = 0; k < terms; k += kBlock) {
    for (int64_t i = 0; i < a.rows; i += kStripe) {
      const Part<T> part_a = part_of(a, i, k);
      const Panels<S> panels_a = {scratch, part_a.rows, stride};
      pack(part_a, threads, panels_a);
      for (int64_t j = 0; j < b.rows; j += kStripe) {
        const Part<T> part_b = part_of(b, j, k);
        const Panels<S> panels_b = {scratch_b, part_b.rows, stride};
        if (i == 0 || b.rows > kStripe) pack(part_b, threads, panels_b);
        multiply_panels(panels_a, panels_b, part_a.terms, weight, threads, out.data + out.batch[e],
                        out.row + i, out.column + j);
      }
    }
  }
}

template <class T>
void add_similarity(const SimilarityOperand& a, const SimilarityOperand& b,
                    const SimilarityOut& out, int64_t batches, int64_t terms, double weight,
                    int most_threads) {
  using S = typename Lanes<T>::scalar;
  const int64_t products = a.rows * b.rows * terms;
  const int64_t size = Panels<S>::size_of(a.rows, terms) + Panels<S>::size_of(b.rows, terms);
  if (products >= kSerial || batches * products < kSerial) {
    const int threads = products < kSerial ? 1 : most_threads;
    const Scratch<S> scratch(size);
    for (int64_t e = 0; e < batches; ++e) {
      add_batch<T>(a, b, out, e, terms, weight, threads, scratch.data());
    }
    return;
  }
  const Scratch<S> scratch(size * most_threads);
  parallel_for(batches, most_threads, [&](int64_t e, int thread) {
    add_batch<T>(a, b, out, e, terms, weight, 1, scratch.data() + thread * size);
  });
}

// Run by run of neighbouring terms, run[k] of them from term k on; null where most stand alone.
template <class T, class S>
void gather_rows(const T* source, const int64_t* row, int64_t rows, const int64_t* term,
                 const int64_t* run, int64_t terms, S* target) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = source + row[i];
    S* to = target + i * terms;
    if constexpr (!std::is_same_v<T, S>) {
      for (int64_t k = 0; k < terms; ++k) to[k] = load_one(from + term[k]);
    } else if (run == nullptr) {
      for (int64_t k = 0; k < terms; ++k) to[k] = from[term[k]];
    } else {
      constexpr int64_t kChunk = 32 / sizeof(T);
      for (int64_t k = 0; k < terms;) {
        const T* const first = from + term[k];
        const int64_t n = run[k];
        int64_t x = 0;
        for (; x + kChunk <= n; x += kChunk) {
          std::memcpy(to + k + x, first + x, kChunk * sizeof(T));
        }
        for (; x < n; ++x) to[k + x] = first[x];
        k += n;
      }
    }
  }
}

// Rows that are neighbours, a term at a time.
template <class T, class S>
void copy_terms(const T* source, int64_t rows, const int64_t* term, int64_t terms, S* target) {
  constexpr int64_t kLanes = Lanes<T>::count;
  for (int64_t k = 0; k < terms; ++k) {
    const T* from = source + term[k];
    S* to = target + k * rows;
    int64_t i = 0;
    for (; i + kLanes <= rows; i += kLanes) store(to + i, load(from + i));
    for (; i < rows; ++i) to[i] = load_one(from + i);
  }
}

}  // namespace

void similarity_gather(const SimilarityOperand& operand, DType dtype, int64_t e, int64_t begin,
                       int64_t end, bool transposed, void* target, int threads) {
  constexpr int64_t kTogether = 32;  // rows or terms of a task
  const int64_t terms = end - begin;
  const int64_t* const term = operand.term + e * operand.term_step + begin;
  const Scratch<int64_t> runs(terms);
  find_runs(term, terms, runs.data());
  int64_t count = 0;
  for (int64_t k = 0; k < terms; k += runs.data()[k]) count += 1;
  const int64_t* const run = 4 * count <= terms ? runs.data() : nullptr;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using S = typename Lanes<T>::scalar;
    const T* const source = static_cast<const T*>(operand.data) + operand.batch[e];
    S* const out = static_cast<S*>(target);
    const int64_t count = transposed ? terms : operand.rows;
    parallel_for(ceil_div(count, kTogether), threads, [&](int64_t task, int) {
      const int64_t first = task * kTogether, n = smaller(kTogether, count - first);
      if (transposed) {
        copy_terms<T, S>(source + operand.row[0], operand.rows, term + first, n,
                         out + first * operand.rows);
      } else {
        gather_rows<T, S>(source, operand.row + first, n, term, run, terms, out + first * terms);
      }
    });
  });
}

void similarity_add(const SimilarityOut& out, int64_t e, int64_t begin, int64_t end,
                    int64_t columns, const void* product, bool wide, double weight, int threads) {
  const int64_t tiles = ceil_div(columns, kTile);
  constexpr int64_t kTogether = 16;  // rows of a task
  parallel_for(ceil_div(end - begin, kTogether), threads, [&](int64_t task, int) {
    const int64_t first = task * kTogether, rows = smaller(kTogether, end - begin - first);
    const int64_t* const row = out.row + begin + first;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t j = t * kTile, n = smaller(kTile, columns - j), at = first * columns + j;
      double* const target = out.data + out.batch[e];
      if (wide) {
        add_tile(static_cast<const double*>(product) + at, columns, weight, rows, n, target, row,
                 out.column + j);
      } else {
        add_tile(static_cast<const float*>(product) + at, columns, weight, rows, n, target, row,
                 out.column + j);
      }
    }
  });
}

void group_similarity(const SimilarityOperand& a, const SimilarityOperand& b,
                      const SimilarityOut& out, DType dtype, int64_t batches, int64_t terms,
                      double weight, int threads) {
  with_dtype(dtype, [&](auto element) {
    add_similarity<decltype(element)>(a, b, out, batches, terms, weight, threads);
  });
}

}  // namespace nlm::NLM_ISA
