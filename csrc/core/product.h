// The inner part of a matrix product: one float64 tile of x y^T, from packed operands.
//
// An operand is packed into panels of one vector of channels each: panel(p)[k * lanes + c % lanes]
// holds channel c, p = c / lanes, of sample k. It is any type with
//
//     static constexpr int64_t kLanes;   // Lanes<S>::count
//     S* panel(int64_t p) const;         // panels lie `stride` elements apart
//     int64_t channels, stride;
//
// Channels behind the last one are 0. An odd number of cache lines between panels keeps the same
// sample of neighbouring panels out of the same cache set.
//
// Numerics. Products are accumulated with fma (where the machine has it) in float32 over 64 samples
// (float64 for float64), four such sums are added, and that is added in float64. The worst case,
// all terms equal, errs by 1.3e-6; random data by 1e-7. An entry sees its samples in the same order
// whatever tile it lies in, so tiles may depend on the number of threads and the bits do not.
//
// Blocking: 3 panels x 256 samples of y (48 KB on AVX-512) stay in the nearest caches while the
// rows of the tile pass by; the float64 tile (72 KB for 96 rows) stays in the second level.
#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace nlm::NLM_ISA {

constexpr int64_t kSlice = 256;  // samples per float64 flush
constexpr int64_t kRun = 64;     // samples that are accumulated in float32
constexpr int64_t kTile = 96;    // columns of a tile; a multiple of all vector lengths

// Register blocking of the multiplication, kRows x kVectors accumulators: 24 of 32 registers with
// AVX-512, 12 of 16 with AVX2, 8 of 16 with SSE, which needs one more for the product.
template <class S>
struct Blocking {
  static constexpr int kLanes = Lanes<S>::count;
  static constexpr int kMost = kVectorBytes == 64 ? 8 : 4;
  static constexpr int kRows = kLanes < kMost ? kLanes : kMost;
#if defined(__x86_64__) && !defined(__FMA__)
  static constexpr int kVectors = 2;
#else
  static constexpr int kVectors = 3;
#endif
};

// tile[kRows, kVectors * lanes] += sum over samples of a[k][row] * b[k][column]; `a` points into a
// panel, `b` at the first of kVectors panels that lie `b_stride` apart.
template <class S, int kVectors>
void multiply(const S* a, const S* b, int64_t b_stride, int64_t samples, double* tile) {
  constexpr int kLanes = Blocking<S>::kLanes;
  constexpr int kRows = Blocking<S>::kRows;
  using V = typename Lanes<S>::vector;
  V total[kRows][kVectors] = {};
  for (int64_t begin = 0; begin < samples; begin += kRun) {
    const int64_t end = smaller(begin + kRun, samples);
    V sum[kRows][kVectors] = {};
    for (int64_t k = begin; k < end; ++k) {
      V column[kVectors];
      for (int j = 0; j < kVectors; ++j) column[j] = load(b + j * b_stride + k * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const V row = broadcast(a[k * kLanes + i]);
        for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(row, column[j], sum[i][j]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) total[i][j] += sum[i][j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      const Wide<S> wide = to_float64<S>(total[i][j]);
      for (int part = 0; part < Wide<S>::kParts; ++part) {
        double* target = tile + i * kTile + j * kLanes + part * Lanes<double>::count;
        store(target, load(target) + wide.part[part]);
      }
    }
  }
}

template <class S>
void multiply(int vectors, const S* a, const S* b, int64_t b_stride, int64_t samples,
              double* tile) {
  if (vectors == 1) return multiply<S, 1>(a, b, b_stride, samples, tile);
  if (vectors == 2) return multiply<S, 2>(a, b, b_stride, samples, tile);
  return multiply<S, Blocking<S>::kVectors>(a, b, b_stride, samples, tile);
}

// A tile in panels: rows [row_begin, row_end) of x, columns [column_begin, column_end) of y.
struct Region {
  int64_t row_begin, row_end, column_begin, column_end;
};

// tile = sum over the block's samples of the scaled deviations' products. Where `same`, what lies
// wholly below the diagonal stays unset.
template <class S, class Operand>
void multiply_tile(const Operand& x, const Operand& y, bool same, const Region& region,
                   int64_t samples, double* tile) {
  constexpr int64_t kLanes = Operand::kLanes;
  constexpr int kMost = Blocking<S>::kVectors;
  const int64_t tile_rows = (region.row_end - region.row_begin) * kLanes;
  std::memset(tile, 0, static_cast<size_t>(tile_rows * kTile) * sizeof(double));
  for (int64_t k = 0; k < samples; k += kSlice) {
    const int64_t count = smaller(kSlice, samples - k);
    for (int64_t column = region.column_begin; column < region.column_end;) {
      const int64_t left = region.column_end - column;
      const int vectors = static_cast<int>(left == 4 ? 2 : smaller(left, kMost));
      for (int64_t row = region.row_begin; row < region.row_end; ++row) {
        if (same && row >= column + vectors) continue;
        const int64_t rows = smaller(kLanes, x.channels - row * kLanes);
        for (int64_t r = 0; r < rows; r += Blocking<S>::kRows) {
          double* target = tile + ((row - region.row_begin) * kLanes + r) * kTile +
                           (column - region.column_begin) * kLanes;
          multiply<S>(vectors, x.panel(row) + k * kLanes + r, y.panel(column) + k * kLanes,
                      y.stride, count, target);
        }
      }
      column += vectors;
    }
  }
}

// Rows of panels per tile of at most `most` rows: fewer when there are few tiles for the threads.
template <class S>
int64_t rows_per_tile(int64_t most, int64_t row_panels, int64_t column_tiles, int threads) {
  int64_t rows = most / Lanes<S>::count;
  while (rows > 1 && ceil_div(row_panels, rows) * column_tiles < 4 * threads) rows /= 2;
  return rows;
}

}  // namespace nlm::NLM_ISA
