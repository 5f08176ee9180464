// TALL-masks on the GPU. The work is tall_mask_body.h's.
//
// Building reads three tensors and writes a bit per entry, applying reads two and writes one. The
// arithmetic is the CPU's, rounding by rounding.
#define NLM_ISA device

#include <cuda_runtime.h>

#include "tall_mask_body.h"

namespace nlm {

using namespace device;

namespace {

struct DeviceMemory {
  DeviceAddress expert, base, merged, out;
  DeviceAddress mask;  // the masks that are counted, or the one mask
  DeviceAddress counts;
};

template <class T, int kPack>
__global__ void __launch_bounds__(kBlockThreads)
    build_kernel(const MaskGrid work, const ComputeType<T> limit, const DeviceMemory memory) {
  build_body<T, kPack>(work, limit, blockIdx.x, threadIdx.x, memory);
}

template <class W, int kPack>
__global__ void __launch_bounds__(kBlockThreads)
    apply_kernel(const MaskGrid work, const DeviceMemory memory) {
  apply_body<W, kPack>(work, blockIdx.x, threadIdx.x, memory);
}

template <class W>
__global__ void __launch_bounds__(kBlockThreads)
    agreement_kernel(const AgreementGrid work, const DeviceMemory memory) {
  agreement_body<W>(work, blockIdx.x, threadIdx.x, memory);
}

template <class T>
cudaError_t build(const DeviceMemory& memory, int64_t count, double limit, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  const bool packed = is_aligned(memory.expert.data, 16) && is_aligned(memory.base.data, 16) &&
                      is_aligned(memory.merged.data, 16);
  const MaskGrid work = make_build_grid(count);
  const int64_t blocks = work.grid.blocks();
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = packed ? build_kernel<T, kPack> : build_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream>>>(
      work, static_cast<ComputeType<T>>(limit), memory);
  return cudaGetLastError();
}

template <class W>
cudaError_t apply(const DeviceMemory& memory, int64_t count, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(W);
  const bool packed = is_aligned(memory.base.data, 16) && is_aligned(memory.merged.data, 16) &&
                      is_aligned(memory.out.data, 16);
  const MaskGrid work = make_apply_grid(count, packed ? kPack : 1);
  const int64_t blocks = work.grid.blocks();
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = packed ? apply_kernel<W, kPack> : apply_kernel<W, 1>;
  kernel<<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream>>>(work, memory);
  return cudaGetLastError();
}

template <class W>
cudaError_t agreement(const AgreementGrid& work, const DeviceMemory& memory, cudaStream_t stream) {
  agreement_kernel<W>
      <<<static_cast<unsigned>(work.blocks()), kBlockThreads, 0, stream>>>(work, memory);
  return cudaGetLastError();
}

}  // namespace

int tall_mask_cuda(const void* expert, const void* base, const void* merged, DType dtype,
                   int64_t count, double limit, uint8_t* mask, void* stream) {
  if (count == 0) return cudaSuccess;
  const DeviceMemory memory = {expert, base, merged, nullptr, mask, nullptr};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat16:
      return build<DeviceFloat16>(memory, count, limit, on);
    case DType::kBFloat16:
      return build<DeviceBFloat16>(memory, count, limit, on);
    case DType::kFloat32:
      return build<float>(memory, count, limit, on);
    case DType::kFloat64:
      return build<double>(memory, count, limit, on);
  }
  return cudaErrorInvalidValue;
}

int tall_mask_apply_cuda(const uint8_t* mask, const void* base, const void* merged,
                         int element_bytes, int64_t count, void* out, void* stream) {
  if (count == 0) return cudaSuccess;
  const DeviceMemory memory = {nullptr, base, merged, out, mask, nullptr};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (element_bytes) {
    case 2:
      return apply<uint16_t>(memory, count, on);
    case 4:
      return apply<uint32_t>(memory, count, on);
    case 8:
      return apply<uint64_t>(memory, count, on);
  }
  return cudaErrorInvalidValue;
}

int64_t tall_mask_walks(int64_t bytes) { return walk_count(bytes); }

int tall_mask_agreement_cuda(const uint8_t* masks, int64_t tasks, int64_t bytes, int64_t least,
                             uint8_t* kept, int64_t* counts, void* stream) {
  if (bytes == 0) return cudaSuccess;
  const DeviceMemory memory = {nullptr, nullptr, nullptr, kept, masks, counts};
  const auto on = static_cast<cudaStream_t>(stream);
  if (bytes % 4 == 0 && is_aligned(masks, 4) && is_aligned(kept, 4)) {
    return agreement<uint32_t>(make_agreement_grid(tasks, bytes, least, 4), memory, on);
  }
  return agreement<uint8_t>(make_agreement_grid(tasks, bytes, least, 1), memory, on);
}

}  // namespace nlm
