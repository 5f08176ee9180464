// The two 16-bit formats: storage types and vector conversions from and to float32.
//
// Widening is exact. Narrowing rounds to nearest, ties to even, overflows to infinity and keeps
// NaN, as torch does. Neither depends on the flush-to-zero mode that a caller may have set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace nlm {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace nlm

namespace nlm::NLM_ISA {

// One vector register of 32-bit lanes, and the same number of 16-bit lanes.
#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
typedef float vfloat __attribute__((vector_size(kVectorBytes)));
typedef int32_t vint32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vuint32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vuint16 __attribute__((vector_size(kVectorBytes / 2)));

NLM_INLINE vuint16 load_bits(const void* source) {
  vuint16 bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits;
}

// By intrinsics where there are: GCC 12 converts half a vector at a time.
#if defined(__AVX512BW__)
// AVX-512 moves halves of lanes in one instruction each: half of those of the plain code below.
NLM_INLINE vfloat widen(const bfloat16* source) {
  const __m512i lanes = _mm512_setr_epi32(0 << 16, 1 << 16, 2 << 16, 3 << 16, 4 << 16, 5 << 16,
                                          6 << 16, 7 << 16, 8 << 16, 9 << 16, 10 << 16, 11 << 16,
                                          12 << 16, 13 << 16, 14 << 16, 15 << 16);
  const __m512i bits = _mm512_castsi256_si512((__m256i)load_bits(source));
  return (vfloat)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, lanes, bits);
}
NLM_INLINE void narrow(bfloat16* target, vfloat value) {
  const __m512i upper =
      _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015,
                        0x001b0019, 0x001f001d, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i u = (__m512i)value;
  const __mmask16 is_odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, is_odd, rounded, _mm512_set1_epi32(1));
  rounded = _mm512_mask_or_epi32(rounded, is_nan, u, _mm512_set1_epi32(0x400000));
  const __m256i bits = _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded));
  std::memcpy(target, &bits, sizeof bits);
}
#else
NLM_INLINE vfloat widen(const bfloat16* source) {
#if defined(__AVX2__)
  const vuint32 low = (vuint32)_mm256_cvtepu16_epi32((__m128i)load_bits(source));
#else
  const vuint32 low = __builtin_convertvector(load_bits(source), vuint32);
#endif
  return (vfloat)(low << 16);
}
NLM_INLINE void narrow(bfloat16* target, vfloat value) {
  const vuint32 u = (vuint32)value;
  const vuint32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vuint32 quiet_nan = (u >> 16) | 0x40u;
  const vuint32 is_nan = (vuint32)((u & 0x7fffffffu) > 0x7f800000u);
  const vuint16 bits = __builtin_convertvector((is_nan & quiet_nan) | (~is_nan & rounded), vuint16);
  std::memcpy(target, &bits, sizeof bits);
}
#endif

#if defined(__AVX512F__)
NLM_INLINE vfloat widen(const float16* source) {
  return (vfloat)_mm512_cvtph_ps((__m256i)load_bits(source));
}
NLM_INLINE void narrow(float16* target, vfloat value) {
  const __m256i bits = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(target, &bits, sizeof bits);
}
#elif defined(__F16C__)
NLM_INLINE vfloat widen(const float16* source) {
  return (vfloat)_mm256_cvtph_ps((__m128i)load_bits(source));
}
NLM_INLINE void narrow(float16* target, vfloat value) {
  const __m128i bits = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(target, &bits, sizeof bits);
}
#else
// A normal number gets its exponent rebiased from 15 to 127; a subnormal one is an integer times
// 2^-24, which float32 holds as a normal number; infinity and NaN get the full exponent.
NLM_INLINE vfloat widen(const float16* source) {
  const vuint32 h = __builtin_convertvector(load_bits(source), vuint32);
  const vuint32 magnitude = h & 0x7fffu;
  const vuint32 normal = (magnitude << 13) + (112u << 23);
  const vuint32 subnormal =
      (vuint32)(__builtin_convertvector((vint32)magnitude, vfloat) * 0x1p-24f);
  const vuint32 special = (magnitude << 13) | 0x7f800000u;
  const vuint32 is_subnormal = (vuint32)(magnitude < 0x400u);
  const vuint32 is_special = (vuint32)(magnitude >= 0x7c00u);
  const vuint32 finite = (is_subnormal & subnormal) | (~is_subnormal & normal);
  return (vfloat)((is_special & special) | (~is_special & finite) | ((h & 0x8000u) << 16));
}
// A result below 2^-14 is rounded by adding 0.5, whose last place is 2^-24; above, by adding half
// of the dropped places; a carry out of the mantissa is the next exponent, or infinity.
NLM_INLINE void narrow(float16* target, vfloat value) {
  const vuint32 u = (vuint32)value;
  const vuint32 magnitude = u & 0x7fffffffu;
  const vuint32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const vuint32 subnormal = (vuint32)((vfloat)magnitude + 0.5f) - 0x3f000000u;
  const vuint32 is_nan = (vuint32)(magnitude > 0x7f800000u);
  const vuint32 special = 0x7c00u | (is_nan & 0x200u);
  const vuint32 is_subnormal = (vuint32)(magnitude < 0x38800000u);
  const vuint32 is_special = (vuint32)(magnitude >= 0x47800000u);
  const vuint32 finite = (is_subnormal & subnormal) | (~is_subnormal & normal);
  const vuint16 bits = __builtin_convertvector(
      (is_special & special) | (~is_special & finite) | ((u >> 16) & 0x8000u), vuint16);
  std::memcpy(target, &bits, sizeof bits);
}
#endif

}  // namespace nlm::NLM_ISA
