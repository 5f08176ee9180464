// The CUDA kernel's work on one (block, thread); tests run the same code over the grid on the CPU.
//
// A block takes segments of entries, as many apart as there are blocks, and of each segment one
// tile of the matrix after another: what the first tile has read, the others find in the caches. A
// thread sums a tile's products in registers; the threads' sums are added in shared memory, in a
// fixed order, and then to the block's own matrix.
//
// The kernel is cut into phases at its barriers; a phase may run its threads one after another.
#pragma once

#include <cstdint>

#include "core/device.h"
#include "inner_products.h"

namespace nlm::NLM_ISA {

inline constexpr int kTileRows = 2, kTileColumns = 4, kTileProducts = kTileRows * kTileColumns;
inline constexpr int kRunsPerThread = 8;  // of a segment
inline constexpr int kFolds = 16;         // parts of a product's 256 sums; 16 each
inline constexpr int64_t kMostRows = 1024;

template <class T>
inline constexpr int kProductRun = 16 / sizeof(T);

template <class T>
int64_t segment_count(int64_t size) {
  constexpr int64_t kSegment = kBlockThreads * kRunsPerThread * kProductRun<T>;
  return (size + kSegment - 1) / kSegment;
}

template <class T>
int64_t product_rows(int64_t size) {
  return segment_count<T>(size) < kMostRows ? segment_count<T>(size) : kMostRows;
}

// What the kernel gets by value (1.1 KB).
struct ProductGrid {
  const void* base;
  const void* tensors[kInnerProductsTensors];
  int64_t size, segments;
  int count;
};

// `packed`: all runs but the last can be moved as packs.
template <class T>
ProductGrid make_product_grid(const VectorSet& set, bool& packed) {
  ProductGrid work = {};
  work.base = set.base;
  packed = is_aligned(set.base, 16);
  for (int k = 0; k < set.count; ++k) {
    work.tensors[k] = set.tensors[k].data;
    packed &= is_aligned(set.tensors[k].data, 16);
  }
  work.size = set.size;
  work.segments = segment_count<T>(set.size);
  work.count = set.count;
  return work;
}

// A tile's first row and column; those behind the last tensor stand for it and are not kept.
struct Tile {
  int row, column;
};

// From {0, 0} on the tiles that cover the upper triangle; a row behind the last ends them.
NLM_DEVICE Tile next_tile(Tile tile, int count) {
  if (tile.column + kTileColumns < count) return {tile.row, tile.column + kTileColumns};
  const int row = tile.row + kTileRows;
  return {row, row / kTileColumns * kTileColumns};
}

// Adds the products of one pack; `at` counts in packs.
template <class T, int kCount, class Memory>
NLM_DEVICE void add_pack(const ProductGrid& work, Tile tile, int64_t at, const Memory& memory,
                         double (&sum)[kTileProducts]) {
  using Run = Pack<T, kCount>;
  const auto tensor = [&](int k) {
    return memory.template tensor<Run>(k < work.count ? k : work.count - 1)[at];
  };
  Run rows[kTileRows], columns[kTileColumns], base = {};
  if (work.base != nullptr) base = memory.template base<Run>()[at];
  for (int r = 0; r < kTileRows; ++r) rows[r] = tensor(tile.row + r);
  for (int c = 0; c < kTileColumns; ++c) columns[c] = tensor(tile.column + c);
  for (int i = 0; i < kCount; ++i) {
    const double start = widen(base.value[i]);
    double row[kTileRows];
    for (int r = 0; r < kTileRows; ++r) row[r] = widen(rows[r].value[i]) - start;
    for (int c = 0; c < kTileColumns; ++c) {
      const double column = widen(columns[c].value[i]) - start;
      for (int r = 0; r < kTileRows; ++r) sum[r * kTileColumns + c] += row[r] * column;
    }
  }
}

template <class T, bool kPacked, class Memory>
NLM_DEVICE void multiply_phase(const ProductGrid& work, int64_t segment, Tile tile, int thread,
                               const Memory& memory) {
  constexpr int kRun = kProductRun<T>;
  double sum[kTileProducts] = {};
  for (int r = 0; r < kRunsPerThread; ++r) {
    const int64_t run = (segment * kRunsPerThread + r) * kBlockThreads + thread;
    if (kPacked && (run + 1) * kRun <= work.size) {
      add_pack<T, kRun>(work, tile, run, memory, sum);
    } else {
      for (int64_t i = run * kRun; i < (run + 1) * kRun && i < work.size; ++i) {
        add_pack<T, 1>(work, tile, i, memory, sum);
      }
    }
  }
  for (int p = 0; p < kTileProducts; ++p) memory.shared(p * kBlockThreads + thread) = sum[p];
}

template <class Memory>
NLM_DEVICE void fold_phase(int thread, const Memory& memory) {
  if (thread >= kTileProducts * kFolds) return;
  const int first = thread / kFolds * kBlockThreads + thread % kFolds;
  double total = 0;
  for (int i = 0; i < kBlockThreads; i += kFolds) total += memory.shared(first + i);
  memory.shared(first) = total;
}

template <class Memory>
NLM_DEVICE void add_phase(const ProductGrid& work, int64_t block, Tile tile, int thread,
                          const Memory& memory) {
  const int row = tile.row + thread / kTileColumns, column = tile.column + thread % kTileColumns;
  if (thread >= kTileProducts || row >= work.count || column >= work.count) return;
  double total = 0;
  for (int i = 0; i < kFolds; ++i) total += memory.shared(thread * kBlockThreads + i);
  memory.partial()[(block * work.count + row) * work.count + column] += total;
}

}  // namespace nlm::NLM_ISA
