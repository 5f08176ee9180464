// products[i, j] = sum_e (tensor_i - base)[e] (tensor_j - base)[e], in float64.
//
// One read of the base and of each tensor. The differences of a block of entries stay in the cache
// as rows of float64, of which two times four are multiplied at a time: their eight sums stay in
// registers. The entries are cut into chunks by their number alone, and the chunks' sums are added
// in order: the result is the same in every bit for any number of threads. Products and sums are
// fma's where the instruction set has it.
#include "inner_products.h"

#include <cstring>

#include "core/blocks.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kBlock = 512;       // entries
constexpr int64_t kLeastBlocks = 64;  // of a chunk
constexpr int64_t kMostChunks = 256;
constexpr int kRows = 2, kColumns = 4;  // of a tile of products

// row = tensor - start, of `n` elements from `first` on; null `start` is zero.
void load_row(const void* data, DType dtype, int64_t first, int64_t n, const double* start,
              double* row) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using V = typename Lanes<T>::vector;
    for_vectors(static_cast<const T*>(data) + first, n, kBlock, [&](int64_t i, V value) {
      const Wide<T> wide = to_float64<T>(value);
      for (const vdouble part : wide.part) {
        store(row + i, start == nullptr ? part : part - load(start + i));
        i += Lanes<double>::count;
      }
    });
  });
}

// Adds the products of kRows rows from `left` on with kColumns from `right` on.
void add_tile(const double* left, const double* right, double* products, int64_t stride) {
  vdouble sum[kRows][kColumns] = {};
  for (int64_t i = 0; i < kBlock; i += Lanes<double>::count) {
    for (int r = 0; r < kRows; ++r) {
      const vdouble row = load(left + r * kBlock + i);
      for (int c = 0; c < kColumns; ++c) {
        sum[r][c] = fma(row, load(right + c * kBlock + i), sum[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) products[r * stride + c] += sum_lanes(sum[r][c]);
  }
}

}  // namespace

void inner_products(const VectorSet& set, double* products, int threads) {
  const int64_t rows = ceil_div(set.count, kColumns) * kColumns;  // those behind the last are zero
  const int64_t blocks = ceil_div(set.size, kBlock);
  const int64_t chunk = larger(ceil_div(blocks, kMostChunks), kLeastBlocks) * kBlock;
  const int64_t chunks = ceil_div(set.size, chunk);
  const int64_t block_doubles = (1 + rows) * kBlock;  // the base and the differences
  const Scratch<double> buffers(threads * block_doubles), sums(chunks * rows * rows);
  parallel_for(chunks, threads, [&](int64_t task, int thread) {
    double* const start = buffers.data() + thread * block_doubles;
    double* const vectors = start + kBlock;
    double* const sum = sums.data() + task * rows * rows;
    const auto clear = [](double* x, int64_t n) {
      std::memset(x, 0, static_cast<size_t>(n) * sizeof(double));
    };
    clear(sum, rows * rows);
    clear(start, block_doubles);
    const int64_t end = smaller((task + 1) * chunk, set.size);
    for (int64_t first = task * chunk; first < end; first += kBlock) {
      const int64_t n = smaller(kBlock, end - first);
      if (n < kBlock) clear(start, block_doubles);
      if (set.base != nullptr) load_row(set.base, set.base_dtype, first, n, nullptr, start);
      for (int k = 0; k < set.count; ++k) {
        load_row(set.tensors[k].data, set.tensors[k].dtype, first, n,
                 set.base == nullptr ? nullptr : start, vectors + k * kBlock);
      }
      for (int64_t i = 0; i < set.count; i += kRows) {
        for (int64_t j = i / kColumns * kColumns; j < rows; j += kColumns) {
          add_tile(vectors + i * kBlock, vectors + j * kBlock, sum + i * rows + j, rows);
        }
      }
    }
  });
  for (int64_t i = 0; i < set.count; ++i) {
    for (int64_t j = i; j < set.count; ++j) {
      double total = 0;
      for (int64_t task = 0; task < chunks; ++task) {
        total += sums.data()[(task * rows + i) * rows + j];
      }
      products[i * set.count + j] = products[j * set.count + i] = total;
    }
  }
}

}  // namespace nlm::NLM_ISA
