// What a kernel body needs to run on a GPU and, block by block and thread by thread, on the CPU.
//
// A body is a function of (block, thread). It reaches memory only through a `Memory` type: raw
// pointers on the GPU, bounds-checked ones in the tests. It contains no barrier, so that running
// the threads one after another is a faithful run; a kernel with shared memory is two bodies.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define NLM_DEVICE __host__ __device__ __forceinline__
#else
#define NLM_DEVICE inline
#endif

namespace nlm {

inline constexpr int kBlockThreads = 256;

// The 16-bit formats by their bits.
struct DeviceBFloat16 {
  uint16_t bits;
};
struct DeviceFloat16 {
  uint16_t bits;
};

// What the arithmetic on stored elements of type T is done in.
template <class T>
using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Neighbouring elements that are moved at once, at most 16 bytes by one instruction.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T value[kCount];
};

// Where a tensor of a kernel's `Memory` begins; a body says what it reads or writes there.
struct DeviceAddress {
  void* data;

  DeviceAddress(const void* address) : data(const_cast<void*>(address)) {}
  template <class T>
  NLM_DEVICE T* as() const {
    return static_cast<T*>(data);
  }
};

inline bool is_aligned(const void* data, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

NLM_DEVICE float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}
NLM_DEVICE uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

NLM_DEVICE float widen(float value) { return value; }
NLM_DEVICE double widen(double value) { return value; }
NLM_DEVICE float widen(DeviceBFloat16 value) {
  return float_of_bits(static_cast<uint32_t>(value.bits) << 16);
}
NLM_DEVICE float widen(DeviceFloat16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude << 13));
  if (magnitude >= 0x0400u) return float_of_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign != 0 ? -subnormal : subnormal;
#endif
}

// Round to nearest, ties to even; overflow is infinity, NaN stays NaN.
NLM_DEVICE void narrow(float value, float& result) { result = value; }
NLM_DEVICE void narrow(double value, double& result) { result = value; }
NLM_DEVICE void narrow(float value, DeviceBFloat16& result) {
  const uint32_t bits = bits_of_float(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
#if defined(__CUDA_ARCH__)
  const uint32_t rounded = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#endif
  result.bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}
NLM_DEVICE void narrow(float value, DeviceFloat16& result) {
#if defined(__CUDA_ARCH__)
  result.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  if (magnitude >= 0x47800000u) half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // Adding 0.5, whose last place is 2^-24, rounds a result below 2^-14 to a multiple of that.
  if (magnitude < 0x38800000u) {
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  result.bits = static_cast<uint16_t>(sign | half);
#endif
}

// `rows` rows of `columns`, cut into blocks: a block is `rows_per_block` rows by one segment of
// columns, a row's threads are `lanes` neighbours that step through the segment together: at least
// a warp where there are columns for it, and at least four columns each.
struct RowGrid {
  int64_t rows, columns;
  int lanes;  // a power of two
  int rows_per_block;
  int64_t segment, segments;  // columns of a segment; segments of a row

  static RowGrid make(int64_t rows, int64_t columns) {
    constexpr int64_t kColumnsPerThread = 8;
    int lanes = 1;
    while (lanes < kBlockThreads && lanes < columns && (lanes < 32 || lanes * 8 <= columns)) {
      lanes *= 2;
    }
    const int64_t segment = lanes * kColumnsPerThread;
    return {
        rows, columns, lanes, kBlockThreads / lanes, segment, (columns + segment - 1) / segment};
  }
  int64_t blocks() const { return (rows + rows_per_block - 1) / rows_per_block * segments; }
  NLM_DEVICE int64_t row(int64_t block, int thread) const {
    return block / segments * rows_per_block + thread / lanes;
  }
  NLM_DEVICE int64_t first_column(int64_t block, int thread) const {
    return block % segments * segment + thread % lanes;
  }
  NLM_DEVICE int64_t end_column(int64_t block) const {
    const int64_t end = (block % segments + 1) * segment;
    return end < columns ? end : columns;
  }
};

// a / b and a % b for 0 <= a, in 32 bits where that is enough: a tenth of the instructions.
NLM_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}
NLM_DEVICE int64_t remainder(int64_t a, int64_t b) { return a - quotient(a, b) * b; }

}  // namespace nlm
