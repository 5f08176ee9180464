// Rows of a cost matrix, the candidates of a row, and a heap: what assignment.cpp works on.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "core/parallel.h"
#include "core/simd.h"

namespace nlm::NLM_ISA {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kHalf = Lanes<double>::count;
constexpr unsigned kAllLanes = (1u << kHalf) - 1;
constexpr int64_t kStep = 2 * kHalf;  // columns of one visit: one vector of float32, two of float64

NLM_INLINE double smaller(double a, double b) { return a < b ? a : b; }
NLM_INLINE double larger(double a, double b) { return a > b ? a : b; }
NLM_INLINE vdouble smaller(vdouble a, vdouble b) { return a < b ? a : b; }

NLM_INLINE double least_lane(vdouble x) {
  double lanes[kHalf];
  store(lanes, x);
  for (int64_t width = kHalf / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) lanes[k] = smaller(lanes[k], lanes[k + width]);
  }
  return lanes[0];
}

// Bit k is set where lane k of `a` is at most that of `b`.
NLM_INLINE unsigned at_most(vdouble a, vdouble b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_pd((__m256d)(a <= b)));
#else
  const vint64 mask = a <= b;
  int64_t lanes[kHalf];  // GCC 12 with -fsanitize=bounds loses the index of a vector's subscript
  std::memcpy(lanes, &mask, sizeof lanes);
  unsigned bits = 0;
  for (int64_t k = 0; k < kHalf; ++k) bits |= (lanes[k] ? 1u : 0u) << k;
  return bits;
#endif
}

// How many values are below `limit`. Reads whole vectors: behind the `count` values there is
// infinity.
NLM_INLINE int64_t count_below(const double* values, int64_t count, double limit) {
  int64_t found = 0;
  for (int64_t k = 0; k < count; k += kHalf) {
    found += __builtin_popcount(at_most(broadcast(limit), load(values + k)) ^ kAllLanes);
  }
  return found;
}

// A vector of float64 from memory. __builtin_convertvector would go through the stack (GCC 12).
NLM_INLINE vdouble load_wide(const double* source) { return load(source); }
NLM_INLINE vdouble load_wide(const float* source) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_cvtps_pd(_mm256_loadu_ps(source));
#elif defined(__AVX2__)
  return (vdouble)_mm256_cvtps_pd(_mm_loadu_ps(source));
#else
  double lanes[kHalf];
  for (int64_t k = 0; k < kHalf; ++k) lanes[k] = source[k];
  return load(lanes);
#endif
}

NLM_INLINE vdouble gather(const double* base, const int32_t* index) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_i32gather_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)),
                                      base, 8);
#elif defined(__AVX2__)
  return (vdouble)_mm256_i32gather_pd(base,
                                      _mm_loadu_si128(reinterpret_cast<const __m128i*>(index)), 8);
#else
  double lanes[kHalf];
  for (int64_t k = 0; k < kHalf; ++k) lanes[k] = base[index[k]];
  return load(lanes);
#endif
}

// A square matrix of costs, to be minimised after multiplication with `sign`.
template <class T>
struct Costs {
  const T* data;
  int64_t n, row_stride;
  double sign;

  NLM_INLINE double at(int64_t i, int64_t j) const { return sign * data[i * row_stride + j]; }

  // Two vectors of costs from column j on, a multiple of kStep; 0 behind the last column.
  NLM_INLINE void load_step(const T* row, int64_t j, vdouble& a, vdouble& b) const {
    T block[kStep];
    const T* source = row + j;
    if (n - j < kStep) {
      for (int64_t k = 0; k < kStep; ++k) block[k] = k < n - j ? source[k] : T(0);
      source = block;
    }
    a = load_wide(source) * sign;
    b = load_wide(source + kHalf) * sign;
  }
  // body(j, a, b): two vectors at a time of row i's columns [first, last).
  template <class Body>
  NLM_INLINE void sweep(int64_t i, int64_t first, int64_t last, const Body& body) const {
    constexpr int64_t kAhead = 2048 / sizeof(T);  // over the end of a page, where prefetchers stop
    const T* row = data + i * row_stride;
    for (int64_t j = first; j < last; j += kStep) {
      __builtin_prefetch(row + j + kAhead);
      vdouble a, b;
      load_step(row, j, a, b);
      body(j, a, b);
    }
  }
};

// min_j cost_ij - v_j; NaN where the sum of the squared costs is not finite.
template <class T>
double least_key(const Costs<T>& costs, const double* v, int64_t i) {
  vdouble low[2] = {broadcast(kInfinity), broadcast(kInfinity)}, squares[2] = {};
  costs.sweep(i, 0, costs.n, [&](int64_t j, vdouble a, vdouble b) {
    squares[0] = fma(a, a, squares[0]);
    squares[1] = fma(b, b, squares[1]);
    low[0] = smaller(a - load(v + j), low[0]);
    low[1] = smaller(b - load(v + j + kHalf), low[1]);
  });
  const bool finite = sum_lanes(squares[0] + squares[1]) < kInfinity;
  return finite ? least_lane(smaller(low[0], low[1])) : std::numeric_limits<double>::quiet_NaN();
}

// Some of a row's cheapest columns, by cost - v at the time when they were chosen. v only falls
// while a problem is solved, so that costs less v only rise: bound[b] stays a lower bound of what
// the blocks b, b + 1, ... and all columns that are not candidates have. Unused entries name the
// column behind the last vector, whose v is minus infinity.
template <class T>
struct Candidates {
  static constexpr int kBlock = 8;
  static constexpr int kBlocks = 4;
  static constexpr int kStripes = 32;
  static constexpr int kGathered = 64;

  double bound[kBlocks + 1];
  T cost[kBlocks * kBlock];
  int32_t column[kBlocks * kBlock];
  int32_t blocks;

  // None but a bound of all columns.
  void choose_none(double least) {
    blocks = 0;
    bound[0] = least;
  }

  // A row is cut into stripes, and the median of the stripes' minima is the threshold that
  // candidates pass, so that two cheap sweeps find about 22. Where many are equal, those from a
  // place on are taken that differs from row to row. False where the sum of the squared costs is
  // not finite.
  bool choose(const Costs<T>& costs, const double* v, int64_t i, int32_t unused) {
    const int64_t n = costs.n;
    const int64_t width = ceil_div(ceil_div(n, kStripes), kStep) * kStep;
    const int64_t stripes = ceil_div(n, width);
    double least[kStripes];
    vdouble squares[2] = {};
    for (int64_t s = 0; s < kStripes; ++s) {
      vdouble low[2] = {broadcast(kInfinity), broadcast(kInfinity)};
      costs.sweep(i, s * width, smaller(n, (s + 1) * width), [&](int64_t j, vdouble a, vdouble b) {
        squares[0] = fma(a, a, squares[0]);
        squares[1] = fma(b, b, squares[1]);
        low[0] = smaller(a - load(v + j), low[0]);
        low[1] = smaller(b - load(v + j + kHalf), low[1]);
      });
      least[s] = least_lane(smaller(low[0], low[1]));
    }
    double limit = -kInfinity;
    for (int64_t s = 0; s < stripes; ++s) {
      if (count_below(least, kStripes, least[s]) <= stripes / 2) limit = larger(least[s], limit);
    }
    if (!(sum_lanes(squares[0] + squares[1]) < kInfinity)) return false;

    double keys[kGathered + kHalf];
    int32_t columns[kGathered];
    double rest = limit;
    int64_t found = 0;
    const auto gather = [&](int64_t s, int64_t first, int64_t last) {
      if (least[s] > limit) return;
      bool full = false;
      costs.sweep(i, first, last, [&](int64_t j, vdouble a, vdouble b) {
        const vdouble key[2] = {a - load(v + j), b - load(v + j + kHalf)};
        unsigned bits = at_most(key[0], broadcast(limit));
        bits |= at_most(key[1], broadcast(limit)) << kHalf;
        if (bits == 0) return;
        full |= found > kGathered - kStep;
        if (full) return;
        double lanes[kStep];
        store(lanes, key[0]);
        store(lanes + kHalf, key[1]);
        for (; bits != 0; bits &= bits - 1) {
          const int k = __builtin_ctz(bits);
          keys[found] = lanes[k];
          columns[found++] = static_cast<int32_t>(j + k);
        }
      });
      if (full) rest = smaller(rest, least[s]);
    };
    const int64_t steps = ceil_div(n, kStep);
    const uint64_t golden = static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u;
    const int64_t start = static_cast<int64_t>(((golden >> 32) * steps) >> 32) * kStep;
    const int64_t first = start / width;
    gather(first, start, smaller(n, (first + 1) * width));
    for (int64_t s = first + 1; s < stripes; ++s) gather(s, s * width, smaller(n, (s + 1) * width));
    for (int64_t s = 0; s < first; ++s) gather(s, s * width, (s + 1) * width);
    gather(first, first * width, start);

    // By rank into their places; equal ones in the order in which they were found.
    const int64_t kept = smaller(found, kBlocks * kBlock);
    blocks = static_cast<int32_t>(ceil_div(kept, kBlock));
    for (int64_t k = kept; k < blocks * kBlock; ++k) {
      cost[k] = 0;
      column[k] = unused;
    }
    store(keys + found, broadcast(kInfinity));
    const T* row = costs.data + i * costs.row_stride;
    uint8_t equal[kGathered] = {};
    for (int64_t k = 0; k < found; ++k) {
      const int64_t below = count_below(keys, found, keys[k]);
      const int64_t rank = below + equal[below]++;
      if (rank < kept) {
        cost[rank] = row[columns[k]];
        column[rank] = columns[k];
        if (rank % kBlock == 0) bound[rank / kBlock] = keys[k];
      } else {
        rest = smaller(rest, keys[k]);
      }
    }
    for (int64_t b = 0; b < blocks; ++b) bound[b] = smaller(bound[b], rest);
    bound[blocks] = rest;
    return true;
  }
};

// The pending columns and rows of a search, the nearest first: each entry is no farther than its
// four children.
class Heap {
 public:
  struct Entry {
    double key;
    int32_t code;
  };
  Heap(Entry* entries, int64_t capacity) : entries_(entries), capacity_(capacity) {}
  void clear() { count_ = 0; }
  bool empty() const { return count_ == 0; }
  bool has_room(int64_t count) const { return count_ + count <= capacity_; }
  const Entry& top() const { return entries_[0]; }

  NLM_INLINE void push(double key, int32_t code) {
    Entry* e = entries_;
    int64_t k = count_++;
    while (k > 0) {
      const int64_t parent = (k - 1) / 4;
      if (!(key < e[parent].key)) break;
      e[k] = e[parent];
      k = parent;
    }
    e[k] = {key, code};
  }
  NLM_INLINE void pop() {
    Entry* e = entries_;
    const Entry last = e[--count_];
    int64_t k = 0;
    for (int64_t child = 1; child < count_; child = 4 * k + 1) {
      int64_t least = child;
      if (child + 4 <= count_) {
        const int64_t left = e[child + 1].key < e[child].key ? child + 1 : child;
        const int64_t right = e[child + 3].key < e[child + 2].key ? child + 3 : child + 2;
        least = e[right].key < e[left].key ? right : left;
      } else {
        for (int64_t other = child + 1; other < count_; ++other) {
          if (e[other].key < e[least].key) least = other;
        }
      }
      if (!(e[least].key < last.key)) break;
      e[k] = e[least];
      k = least;
    }
    e[k] = last;
  }

 private:
  Entry* entries_;
  int64_t capacity_, count_ = 0;
};

}  // namespace nlm::NLM_ISA
