// merged = base + scale * mean of the kept differences that have the elected sign, per entry.
//
// One read of the base and of each expert, one write. The kept differences of a vector of entries
// stay in the first-level cache while their votes are counted, and those that agree with the vote
// are then summed in the experts' order. Every product, sum and quotient is rounded by itself, in
// float32 (float64 where any tensor is), as the plain PyTorch expression does: the results are the
// same in every bit.
#include "sign_merge.h"

#include <cstring>
#include <type_traits>

#include "core/blocks.h"
#include "core/gather.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/stream.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kTaskElements = 32768;
constexpr int64_t kBlock = 512;   // elements that are widened at a time
constexpr int64_t kAhead = 2048;  // bytes that are fetched before they are read

template <class S>
struct Signs;
template <>
struct Signs<float> {
  using integers = vint32;
  static constexpr int32_t kMagnitude = INT32_MAX;
};
template <>
struct Signs<double> {
  using integers = vint64;
  static constexpr int64_t kMagnitude = INT64_MAX;
};

template <class S>
struct Terms {
  S thresholds[kSignMergeExperts];
  S weights[kSignMergeExperts];
  S shares[kSignMergeExperts];  // what mergekit divides by: the weights, or 0
  S scale;
  int count;
  bool tie;         // a vote of 0 elects +
  bool unweighted;  // all weights and shares are 1
};

struct alignas(64) Ballot {
  int64_t signs, contested;
};

// Vectors that are merged together, whose sums fill each other's waits.
constexpr int kTogether = kVectorBytes == 64 ? 4 : 2;

// merged[v] at vectors of positions; load_at(source, v) reads them. Source 0 is the base.
template <class T, SignDialect kDialect, bool kWeighted, int kVectors, class Load, class I>
NLM_INLINE void merge_vectors(const Terms<typename Lanes<T>::scalar>& terms, const Load& load_at,
                              typename Lanes<T>::vector* merged, I& signs, I& contested) {
  using S = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vector;
  constexpr bool kOwnVoice = kWeighted && kDialect == SignDialect::kPeft;
  const V zero = {}, one = broadcast(S{1});
  V vote[kVectors] = {}, voices[kSignMergeExperts][kVectors];
  for (int k = 0; k < terms.count; ++k) {
    for (int v = 0; v < kVectors; ++v) {
      const V difference = load_at(k + 1, v) - load_at(0, v);
      const V magnitude = (V)((I)difference & Signs<S>::kMagnitude);
      V voice = magnitude < broadcast(terms.thresholds[k]) ? zero : difference;
      if constexpr (kWeighted && !kOwnVoice) voice = voice * broadcast(terms.weights[k]);
      vote[v] = vote[v] + voice;
      voices[k][v] = voice;
    }
  }
  const bool tie = kDialect != SignDialect::kGlobal || terms.tie;
  V rejected[kVectors], sum[kVectors] = {}, share[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) {
    rejected[v] = tie ? vote[v] < zero ? -zero : zero : vote[v] > zero ? zero : -zero;
  }
  for (int k = 0; k < terms.count; ++k) {
    const V weight = broadcast(kWeighted ? terms.weights[k] : S{1});
    const V part =
        kWeighted && kDialect == SignDialect::kMergekit ? broadcast(terms.shares[k]) : one;
    for (int v = 0; v < kVectors; ++v) {
      const V agreeing = (V)((I)voices[k][v] ^ (I)rejected[v]);
      const V value = kOwnVoice ? voices[k][v] * weight : voices[k][v];
      sum[v] = agreeing > zero ? sum[v] + value : sum[v];
      share[v] = agreeing > zero ? share[v] + part : share[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kDialect == SignDialect::kGlobal) {
      signs = vote[v] > zero ? signs + 1 : signs;
      signs = vote[v] < zero ? signs - 1 : signs;
      contested = (vote[v] == zero) & (share[v] > zero) ? contested + 1 : contested;
    }
    if constexpr (kWeighted && kDialect == SignDialect::kMergekit) {
      share[v] = share[v] == zero ? one : share[v];
    } else {
      share[v] = share[v] > one ? share[v] : one;  // a count
    }
    const V result = load_at(0, v) + broadcast(terms.scale) * (sum[v] / share[v]);
    merged[v] = vote[v] == vote[v] ? result : vote[v];
  }
}

// Whether a lane is not zero.
template <class I>
NLM_INLINE bool any(I lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
  return sum_lanes(lanes) != 0;  // no lane is negative
#endif
}

// `n` elements of packed sources of one type, group by group.
template <class T, SignDialect kDialect, bool kWeighted>
void merge_run(const Terms<typename Lanes<T>::scalar>& terms, const T* const* sources, T* target,
               int64_t n, uint8_t* contested, bool streamed, Ballot& ballot) {
  using I = typename Signs<typename Lanes<T>::scalar>::integers;
  using V = typename Lanes<T>::vector;
  constexpr int kLanes = Lanes<T>::count;
  constexpr bool kGlobal = kDialect == SignDialect::kGlobal;
  I signs = {}, ties = {};
  for (int64_t i = 0; i < n; ++contested) {
    const int64_t end = smaller(i + kSignMergeGroup, n);
    if (kGlobal && !terms.tie && *contested == 0) {
      i = end;
      continue;
    }
    for (int s = 0; s <= terms.count; ++s) {
      prefetch(sources[s] + i + kAhead / sizeof(T), kSignMergeGroup);
    }
    I tied = {};
    for (; i + kTogether * kLanes <= end; i += kTogether * kLanes) {
      V merged[kTogether];
      merge_vectors<T, kDialect, kWeighted, kTogether>(
          terms, [&](int s, int v) { return load(sources[s] + i + v * kLanes); }, merged, signs,
          tied);
      for (int v = 0; v < kTogether; ++v) store(target + i + v * kLanes, merged[v], streamed);
    }
    for (; i < end; i += kLanes) {
      const int64_t left = smaller(kLanes, end - i);
      V merged;
      merge_vectors<T, kDialect, kWeighted, 1>(
          terms, [&](int s, int) { return load_strided(sources[s] + i, 1, left); }, &merged, signs,
          tied);
      store_strided(target + i, 1, merged, left);
    }
    i = end;
    if (kGlobal && terms.tie) {
      *contested = any(tied);
      ties += tied;
    }
  }
  end_stream(streamed);
  ballot.signs += sum_lanes(signs);
  ballot.contested += sum_lanes(ties);
}

template <class T>
void merge_run(SignDialect dialect, const Terms<typename Lanes<T>::scalar>& terms,
               const T* const* sources, T* target, int64_t n, uint8_t* contested, bool streamed,
               Ballot& ballot) {
  const auto run = [&](auto named) {
    constexpr SignDialect kDialect = decltype(named)::value;
    const auto merge =
        terms.unweighted ? merge_run<T, kDialect, false> : merge_run<T, kDialect, true>;
    merge(terms, sources, target, n, contested, streamed, ballot);
  };
  switch (dialect) {
    case SignDialect::kGlobal:
      return run(std::integral_constant<SignDialect, SignDialect::kGlobal>{});
    case SignDialect::kMergekit:
    case SignDialect::kMergekitSum:
      return run(std::integral_constant<SignDialect, SignDialect::kMergekit>{});
    case SignDialect::kPeft:
      return run(std::integral_constant<SignDialect, SignDialect::kPeft>{});
  }
}

template <class S>
Terms<S> terms_of(const SignMergeItem& item) {
  Terms<S> terms;
  terms.unweighted = true;
  for (int k = 0; k < item.count; ++k) {
    terms.thresholds[k] = static_cast<const S*>(item.thresholds)[k];
    terms.weights[k] = static_cast<S>(item.experts[k].weight);
    terms.shares[k] = item.dialect == SignDialect::kMergekitSum ? 0 : terms.weights[k];
    terms.unweighted &= terms.weights[k] == 1 && terms.shares[k] == 1;
  }
  terms.scale = static_cast<S>(item.scale);
  terms.count = item.count;
  terms.tie = !item.again;
  return terms;
}

// run(first, end, thread) for all ranges of a task's length.
template <class Run>
void for_ranges(int64_t size, int threads, const Run& run) {
  parallel_for(ceil_div(size, kTaskElements), threads, [&](int64_t task, int thread) {
    const int64_t first = task * kTaskElements;
    run(first, smaller(first + kTaskElements, size), thread);
  });
}

// Tensors of one type.
template <class T>
void merge_alike(const SignMergeItem& item, Ballot* ballots, int threads) {
  const auto terms = terms_of<typename Lanes<T>::scalar>(item);
  const bool streamed =
      !item.again && streams(static_cast<const T*>(item.target),
                             item.size * static_cast<int64_t>(sizeof(T)), Lanes<T>::count);
  for_ranges(item.size, threads, [&](int64_t first, int64_t end, int thread) {
    const T* sources[kSignMergeExperts + 1] = {static_cast<const T*>(item.base) + first};
    for (int k = 0; k < item.count; ++k) {
      sources[k + 1] = static_cast<const T*>(item.experts[k].data) + first;
    }
    merge_run<T>(item.dialect, terms, sources, static_cast<T*>(item.target) + first, end - first,
                 item.contested + first / kSignMergeGroup, streamed, ballots[thread]);
  });
}

// Tensors of any types, widened to S block by block.
template <class S>
void merge_mixed(const SignMergeItem& item, Ballot* ballots, int threads) {
  const Terms<S> terms = terms_of<S>(item);
  const int64_t rows = item.count + 2;  // base, experts, result
  const Scratch<S> blocks(threads * rows * kBlock);
  for_ranges(item.size, threads, [&](int64_t first, int64_t end, int thread) {
    S* const base = blocks.data() + thread * rows * kBlock;
    S* const result = base + (rows - 1) * kBlock;
    const S* sources[kSignMergeExperts + 1];
    for (int64_t i = first; i < end; i += kBlock) {
      const int64_t n = smaller(kBlock, end - i);
      sources[0] = widened(item.base, item.dtype, i, n, base);
      for (int k = 0; k < item.count; ++k) {
        const WeightedTensor& expert = item.experts[k];
        sources[k + 1] = widened(expert.data, expert.dtype, i, n, base + (k + 1) * kBlock);
      }
      if (item.again) {  // the groups that are left alone
        const S* old = widened(item.target, item.dtype, i, n, result);
        if (old != result) std::memcpy(result, old, static_cast<size_t>(n) * sizeof(S));
      }
      merge_run<S>(item.dialect, terms, sources, result, n, item.contested + i / kSignMergeGroup,
                   false, ballots[thread]);
      narrowed(result, n, item.target, item.dtype, i);
    }
  });
}

}  // namespace

void sign_merge(const SignMergeItem& item, int64_t* ballot, int threads) {
  const Scratch<Ballot> ballots(threads);
  for (int t = 0; t < threads; ++t) ballots.data()[t] = {};
  bool alike = true, wide = item.dtype == DType::kFloat64;
  for (int k = 0; k < item.count; ++k) {
    alike &= item.experts[k].dtype == item.dtype;
    wide |= item.experts[k].dtype == DType::kFloat64;
  }
  with_dtype(item.dtype, [&](auto type) {
    using T = decltype(type);
    if (alike) merge_alike<T>(item, ballots.data(), threads);
  });
  if (!alike && wide) merge_mixed<double>(item, ballots.data(), threads);
  if (!alike && !wide) merge_mixed<float>(item, ballots.data(), threads);
  if (item.again) return;
  ballot[0] = ballot[1] = 0;
  for (int t = 0; t < threads; ++t) {
    ballot[0] += ballots.data()[t].signs;
    ballot[1] += ballots.data()[t].contested;
  }
}

}  // namespace nlm::NLM_ISA
