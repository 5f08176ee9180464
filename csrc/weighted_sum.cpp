// target = base + scale * (sum_k weight_k (tensor_k - base) / divisor), entry by entry.
//
// One read of the base and of each tensor, one write. A block of sums stays in the first-level
// cache while the tensors are added to it one after another: each is read in its own type, and its
// next block is fetched meanwhile. Every operation is rounded by itself, as the plain PyTorch
// expression does: the results are the same in every bit.
#include "weighted_sum.h"

#include <type_traits>

#include "core/blocks.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/stream.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // entries

// for_vectors() of elements of any type, as S; `buffer` holds a block.
template <class S, class Use>
NLM_INLINE void for_vectors_as(const void* data, DType dtype, int64_t first, int64_t n, S* buffer,
                               const Use& use) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<typename Lanes<T>::scalar, S>) {
      for_vectors(static_cast<const T*>(data) + first, n, kBlock, use);
    } else {
      for_vectors(widened(data, dtype, first, n, buffer), n, kBlock, use);
    }
  });
}

// What value(i) gives, rounded to the target's type.
template <class S, class Value>
NLM_INLINE void write(const WeightedSum& work, int64_t first, int64_t n, bool streamed, S* buffer,
                      const Value& value) {
  with_dtype(work.target_dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<typename Lanes<T>::scalar, S>) {
      constexpr int kLanes = Lanes<T>::count;
      T* const target = static_cast<T*>(work.target) + first;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(target + i, value(i), streamed);
      if (i < n) store_first(target + i, value(i), n - i);
    } else {
      for (int64_t i = 0; i < n; i += Lanes<S>::count) store(buffer + i, value(i));
      narrowed(buffer, n, work.target, work.target_dtype, first);
    }
  });
}

// Computed in S.
template <class S>
void sum_tensors(const WeightedSum& work, int threads) {
  using V = typename Lanes<S>::vector;
  const V divisor = broadcast(static_cast<S>(work.divisor));
  const V scale = broadcast(static_cast<S>(work.scale));
  const bool divided = static_cast<S>(work.divisor) != 1;
  const bool based = work.base != nullptr, alone = work.count == 0;
  bool streamed = false;
  with_dtype(work.target_dtype, [&](auto type) {
    using T = decltype(type);
    streamed = streams(static_cast<const T*>(work.target),
                       work.size * static_cast<int64_t>(sizeof(T)), Lanes<T>::count);
  });
  const int64_t task_entries = entries_per_task(work.size);
  parallel_for(ceil_div(work.size, task_entries), threads, [&](int64_t task, int) {
    alignas(64) S start[kBlock] = {}, sum[kBlock], buffer[kBlock];  // x - 0 is x
    const int64_t end = smaller((task + 1) * task_entries, work.size);
    for (int64_t first = task * task_entries; first < end; first += kBlock) {
      const int64_t n = smaller(kBlock, end - first);
      if (based) {
        for_vectors_as<S>(work.base, work.base_dtype, first, n, buffer,
                          [&](int64_t i, V value) { store(start + i, value); });
      }
      for (int64_t i = 0; i < kBlock; i += Lanes<S>::count) store(sum + i, V{});
      for (int k = 0; k < work.count; ++k) {
        const WeightedTensor& tensor = work.tensors[k];
        const V weight = broadcast(static_cast<S>(tensor.weight));
        for_vectors_as<S>(tensor.data, tensor.dtype, first, n, buffer, [&](int64_t i, V value) {
          store(sum + i, load(sum + i) + weight * (value - load(start + i)));
        });
      }
      write(work, first, n, streamed, buffer, [&](int64_t i) {
        if (alone) return load(start + i);
        V total = load(sum + i);
        if (divided) total = total / divisor;
        total = total * scale;
        return based ? load(start + i) + total : total;
      });
    }
    end_stream(streamed);
  });
}

}  // namespace

void weighted_sum(const WeightedSum& work, int threads) {
  bool wide = work.base != nullptr && work.base_dtype == DType::kFloat64;
  for (int k = 0; k < work.count; ++k) wide |= work.tensors[k].dtype == DType::kFloat64;
  wide ? sum_tensors<double>(work, threads) : sum_tensors<float>(work, threads);
}

}  // namespace nlm::NLM_ISA
