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
// behind them is not touched. AVX-512 does it in one instruction.
template <class T>
NLM_INLINE typename Lanes<T>::vector load_first(const T* source, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const unsigned lanes = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), source);
    return load(reinterpret_cast<const T*>(&bits));
  } else if constexpr (sizeof(T) == 4) {
    return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), source);
  } else {
    return (vdouble)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), source);
  }
#else
  T block[Lanes<T>::count] = {};
  std::memcpy(block, source, static_cast<size_t>(count) * sizeof(T));
  return load(block);
#endif
}
template <class T>
NLM_INLINE void store_first(T* target, typename Lanes<T>::vector value, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const unsigned lanes = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    __m256i bits;
    store(reinterpret_cast<T*>(&bits), value);
    _mm256_mask_storeu_epi16(target, static_cast<__mmask16>(lanes), bits);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(target, static_cast<__mmask16>(lanes), (__m512)value);
  } else {
    _mm512_mask_storeu_pd(target, static_cast<__mmask8>(lanes), (__m512d)value);
  }
#else
  T block[Lanes<T>::count];
  store(block, value);
  std::memcpy(target, block, static_cast<size_t>(count) * sizeof(T));
#endif
}

// Lane by lane, all bits of an integer: whether it is one of the first `count`, 0 <= count.
template <class T>
NLM_INLINE auto first_lanes(int64_t count) {
  std::conditional_t<std::is_same_v<T, double>, vint64, vint32> lanes = {};
  for (int i = 0; i < Lanes<T>::count; ++i) lanes[i] = i;
  return lanes < (lanes * 0 + static_cast<int>(count));
}

// Lanes from `count` elements (1 <= count <= Lanes<T>::count) that lie `stride` apart.
template <class T>
NLM_INLINE typename Lanes<T>::vector load_strided(const T* source, int64_t stride, int64_t count) {
  if (stride == 1) return count < Lanes<T>::count ? load_first(source, count) : load(source);
  T block[Lanes<T>::count] = {};
  for (int64_t i = 0; i < count; ++i) block[i] = source[i * stride];
  return load(block);
}
template <class T>
NLM_INLINE void store_strided(T* target, int64_t stride, typename Lanes<T>::vector value,
                              int64_t count) {
  if (stride == 1) {
    return count < Lanes<T>::count ? store_first(target, value, count) : store(target, value);
  }
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

// The lower (kHalf = 0) or the upper half of a vector. By intrinsics where there are: GCC 12 sends
// what is copied in part through memory, and converts a quarter at a time. (maskz: its header reads
// an undefined vector elsewhere.)
template <int kHalf, class V>
NLM_INLINE auto half_of(V value) {
  using scalar = std::remove_cv_t<std::remove_reference_t<decltype(value[0])>>;
  typedef scalar half __attribute__((vector_size(sizeof(V) / 2)));
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return (half)_mm512_maskz_extracti64x4_epi64(255, (__m512i)value, kHalf);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return (half)_mm256_extracti128_si256((__m256i)value, kHalf);
#endif
  half result;
  std::memcpy(&result, reinterpret_cast<const char*>(&value) + kHalf * sizeof result,
              sizeof result);
  return result;
}

typedef float vhalf __attribute__((vector_size(kVectorBytes / 2)));
NLM_INLINE vdouble widen(vhalf value) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_maskz_cvtps_pd(255, (__m256)value);
#elif defined(__AVX2__)
  return (vdouble)_mm256_cvtps_pd((__m128)value);
#else
  return __builtin_convertvector(value, vdouble);
#endif
}

// A float64 vector of elements: half as many of float32 as load() takes. A load that converts costs
// less than to_float64() of a vector.
NLM_INLINE vdouble load_float64(const float* source) { return widen(load_vector<vhalf>(source)); }
NLM_INLINE vdouble load_float64(const double* source) { return load(source); }

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
    return {{widen(half_of<0>(value)), widen(half_of<1>(value))}};
  }
}

// The inverse of to_float64, rounded to nearest.
NLM_INLINE vdouble from_float64(const Wide<double>& wide) { return wide.part[0]; }
NLM_INLINE vfloat from_float64(const Wide<float>& wide) {
  const vhalf low = __builtin_convertvector(wide.part[0], vhalf);
  const vhalf high = __builtin_convertvector(wide.part[1], vhalf);
#if defined(__AVX512F__)  // not through memory: a load waits for two stores of half its size
  const __m512d whole = _mm512_castps_pd(_mm512_zextps256_ps512((__m256)low));
  return (vfloat)_mm512_maskz_insertf64x4(0xff, whole, (__m256d)high, 1);
#elif defined(__AVX2__)
  return (vfloat)_mm256_insertf128_ps(_mm256_zextps128_ps256((__m128)low), (__m128)high, 1);
#else
  vfloat value;
  std::memcpy(&value, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&value) + sizeof low, &high, sizeof high);
  return value;
#endif
}

// Sum of the lanes by halving: a fixed tree.
template <class V>
NLM_INLINE auto sum_lanes(V value) {
  using scalar = std::remove_cv_t<std::remove_reference_t<decltype(value[0])>>;
  if constexpr (sizeof(V) == 2 * sizeof(scalar)) {
    return static_cast<scalar>(value[0] + value[1]);
  } else {
    return sum_lanes(half_of<0>(value) + half_of<1>(value));
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
