// The bodies of weighted_sum and inner_products over their grids (emulation.h).
#define NLM_ISA emulation

#include "emulation.h"
#include "inner_products_body.h"
#include "weighted_sum_body.h"

using namespace nlm;
using namespace nlm::emulation;

namespace {

struct SumMemory {
  const SumGrid& work;
  const Range* ranges;  // of the base, the target and the tensors

  template <class T>
  Checked<const T> base() const {
    return checked<const T>(work.base, ranges[0]);
  }
  template <class T>
  Checked<const T> tensor(int k) const {
    return checked<const T>(work.tensors[k], ranges[2 + k]);
  }
  template <class T>
  Checked<T> target() const {
    return checked<T>(work.target, ranges[1]);
  }
};

struct ProductMemory {
  const ProductGrid& work;
  const Range* ranges;  // of the partial sums, the base and the tensors
  double* sums;
  const double* rows;

  template <class T>
  Checked<const T> base() const {
    return checked<const T>(work.base, ranges[1]);
  }
  template <class T>
  Checked<const T> tensor(int k) const {
    return checked<const T>(work.tensors[k], ranges[2 + k]);
  }
  double& shared(int i) const { return sums[i]; }
  Checked<double> partial() const { return checked<double>(rows, ranges[0]); }
};

template <class T, bool kPacked>
int64_t run_products(const ProductGrid& work, const double* partial, const Range* ranges,
                     int64_t first_block, int64_t end_block) {
  std::vector<double> sums(kTileProducts * kBlockThreads, __builtin_nan(""));
  const ProductMemory memory = {work, ranges, sums.data(), partial};
  violations = 0;
  const int64_t blocks = product_rows<T>(work.size);
  const auto all_threads = [](const auto& phase) {
    for (int thread = 0; thread < kBlockThreads; ++thread) phase(thread);
  };
  for (int64_t block = first_block; block < (end_block < 0 ? blocks : end_block); ++block) {
    for (int64_t segment = block; segment < work.segments; segment += blocks) {
      for (Tile tile = {0, 0}; tile.row < work.count; tile = next_tile(tile, work.count)) {
        all_threads(
            [&](int thread) { multiply_phase<T, kPacked>(work, segment, tile, thread, memory); });
        all_threads([&](int thread) { fold_phase(thread, memory); });
        all_threads([&](int thread) { add_phase(work, block, tile, thread, memory); });
      }
    }
  }
  return violations;
}

}  // namespace

extern "C" {

int64_t emulate_inner_products_rows(int64_t size, int dtype) {
  return with_device_type(dtype, [&](auto type) { return product_rows<decltype(type)>(size); });
}

int64_t emulate_inner_products(const VectorSet* set, const double* partial, const Range* ranges,
                               int64_t first_block, int64_t end_block) {
  return with_device_type(static_cast<int>(set->base_dtype), [&](auto type) {
    using T = decltype(type);
    bool packed = false;
    const ProductGrid work = make_product_grid<T>(*set, packed);
    const auto go = packed ? run_products<T, true> : run_products<T, false>;
    return go(work, partial, ranges, first_block, end_block);
  });
}

int64_t emulate_weighted_sum(const WeightedSum* sum, const Range* ranges, int64_t first_block,
                             int64_t end_block) {
  if (sum->size == 0) return 0;
  return with_device_type(static_cast<int>(sum->target_dtype), [&](auto type) {
    using T = decltype(type);
    bool packed = false;
    const SumGrid work = make_sum_grid<T>(*sum, packed);
    const SumMemory memory = {work, ranges};
    return run(work.grid.blocks(), first_block, end_block, [&](int64_t block, int thread) {
      if (packed) {
        sum_body<T, true>(work, block, thread, memory);
      } else {
        sum_body<T, false>(work, block, thread, memory);
      }
    });
  });
}

}  // extern "C"
