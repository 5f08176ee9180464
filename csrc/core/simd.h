// Vectors of the width of the instruction set that a kernel file is compiled for.
//
// The types are GCC/Clang vector extensions: + - * / and comparisons work lane by lane, on x86 and
// on Arm alike. `Lanes<T>` says, for a stored type T, which vector it is computed in: float32 for
// the 16-bit types and float32, float64 for float64. A kernel is one template over T:
//
//     for (; i + Lanes<T>::count <= n; i += Lanes<T>::count) store(y + i, load(x + i) * scale);
//     if (i < n) store_first(y + i, load_first(x + i, n - i) * scale, n - i);
//
// The build forbids contraction (-ffp-contract=off), so a * b + c rounds twice in every clone;
// fma() rounds once where the instruction exists (v3, v4, Arm), and only kernels that document it
// use it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bf16.h"
#include "view.h"

namespace nlm::NLM_ISA {

typedef double vdouble __attribute__((vector_size(kVectorBytes)));
typedef int64_t vint64 __attribute__((vector_size(kVectorBytes)));

template <class T>
struct Lanes {
  using scalar = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using vector = std::conditional_t<std::is_same_v<T, double>, vdouble, vfloat>;
  static constexpr int count = kVectorBytes / static_cast<int>(sizeof(scalar));
};

template <class V>
NLM_INLINE V load_vector(const void* source) {
  V value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

NLM_INLINE vfloat load(const float* source) { return load_vector<vfloat>(source); }
NLM_INLINE vdouble load(const double* source) { return load_vector<vdouble>(source); }
NLM_INLINE vfloat load(const bfloat16* source) { return widen(source); }
NLM_INLINE vfloat load(const float16* source) { return widen(source); }

NLM_INLINE void store(float* target, vfloat value) { std::memcpy(target, &value, sizeof value); }
NLM_INLINE void store(double* target, vdouble value) { std::memcpy(target, &value, sizeof value); }
NLM_INLINE void store(bfloat16* target, vfloat value) { narrow(target, value); }
NLM_INLINE void store(float16* target, vfloat value) { narrow(target, value); }

// The first `count` lanes, 0 < count < Lanes<T>::count; the other lanes read as zero, and memory
// behind them is not touched.
template <class T>
NLM_INLINE typename Lanes<T>::vector load_first(const T* source, int64_t count) {
  T block[Lanes<T>::count] = {};
  std::memcpy(block, source, static_cast<size_t>(count) * sizeof(T));
  return load(block);
}
template <class T>
NLM_INLINE void store_first(T* target, typename Lanes<T>::vector value, int64_t count) {
  T block[Lanes<T>::count];
  store(block, value);
  std::memcpy(target, block, static_cast<size_t>(count) * sizeof(T));
}

// Lanes from `count` elements (1 <= count <= Lanes<T>::count) that lie `stride` apart.
template <class T>
NLM_INLINE typename Lanes<T>::vector load_strided(const T* source, int64_t stride, int64_t count) {
  T block[Lanes<T>::count] = {};
  for (int64_t i = 0; i < count; ++i) block[i] = source[i * stride];
  return load(block);
}
template <class T>
NLM_INLINE void store_strided(T* target, int64_t stride, typename Lanes<T>::vector value,
                              int64_t count) {
  T block[Lanes<T>::count];
  store(block, value);
  for (int64_t i = 0; i < count; ++i) target[i * stride] = block[i];
}

// x - 0 is x for every x, -0 included.
NLM_INLINE vfloat broadcast(float value) { return value - vfloat{}; }
NLM_INLINE vdouble broadcast(double value) { return value - vdouble{}; }

NLM_INLINE vfloat magnitude(vfloat x) { return (vfloat)((vuint32)x & 0x7fffffffu); }
NLM_INLINE vdouble magnitude(vdouble x) { return (vdouble)((vint64)x & INT64_MAX); }

NLM_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  for (int i = 0; i < Lanes<float>::count; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
NLM_INLINE vdouble fma(vdouble a, vdouble b, vdouble c) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  for (int i = 0; i < Lanes<double>::count; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// A vector as `kParts` float64 vectors: its lower and its upper half, or itself.
template <class T>
struct Wide {
  static constexpr int kParts = std::is_same_v<T, double> ? 1 : 2;
  vdouble part[kParts];
};
template <class T>
NLM_INLINE Wide<T> to_float64(typename Lanes<T>::vector value) {
  if constexpr (std::is_same_v<T, double>) {
    return {{value}};
  } else {
    typedef float half_vector __attribute__((vector_size(kVectorBytes / 2)));
    half_vector low, high;
    std::memcpy(&low, &value, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
    return {{__builtin_convertvector(low, vdouble), __builtin_convertvector(high, vdouble)}};
  }
}

// The inverse of to_float64, rounded to nearest.
NLM_INLINE vdouble from_float64(const Wide<double>& wide) { return wide.part[0]; }
NLM_INLINE vfloat from_float64(const Wide<float>& wide) {
  typedef float half_vector __attribute__((vector_size(kVectorBytes / 2)));
  const half_vector low = __builtin_convertvector(wide.part[0], half_vector);
  const half_vector high = __builtin_convertvector(wide.part[1], half_vector);
  vfloat value;
  std::memcpy(&value, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&value) + sizeof low, &high, sizeof high);
  return value;
}

// Sum of the lanes by halving: a fixed tree.
template <class V>
NLM_INLINE auto sum_lanes(V value) {
  using scalar = std::remove_cv_t<std::remove_reference_t<decltype(value[0])>>;
  if constexpr (sizeof(V) == 2 * sizeof(scalar)) {
    return static_cast<scalar>(value[0] + value[1]);
  } else {
    typedef scalar half __attribute__((vector_size(sizeof(V) / 2)));
    half low, high;
    std::memcpy(&low, &value, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
    return sum_lanes(low + high);
  }
}

// One element, through the same conversions.
template <class T>
NLM_INLINE typename Lanes<T>::scalar load_one(const T* source) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    return *source;
  } else {
    return load_first(source, 1)[0];
  }
}
template <class T>
NLM_INLINE void store_one(T* target, typename Lanes<T>::scalar value) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    *target = value;
  } else {
    store_first(target, broadcast(value), 1);
  }
}

// body(T{}) with the element type that `dtype` names.
template <class Body>
NLM_INLINE void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(float16{});
    case DType::kBFloat16:
      return body(bfloat16{});
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
  }
}

}  // namespace nlm::NLM_ISA
