// Drop and rescale on the GPU. The work is dare_body.h's.
//
// Two reads, one write, and a fourth of a Philox4x32-10 per entry. The arithmetic is the CPU's,
// rounding by rounding.
#define NLM_ISA device

#include <cuda_runtime.h>

#include "dare_body.h"

namespace nlm {

using namespace device;

namespace {

struct DeviceMemory {
  DeviceAddress expert, base, out;
};

template <class T, bool kPacked>
__global__ void __launch_bounds__(kBlockThreads)
    drop_kernel(const __grid_constant__ DropGrid work, const ComputeType<T> scale,
                const DeviceMemory memory) {
  drop_body<T, kPacked>(work, scale, blockIdx.x, threadIdx.x, memory);
}

template <class T>
cudaError_t launch(const DeviceMemory& memory, int64_t count, const Drop& drop,
                   cudaStream_t stream) {
  bool packed = false;
  const DropGrid work =
      make_drop_grid<T>(memory.expert.data, memory.base.data, memory.out.data, count, drop, packed);
  const int64_t blocks = work.grid.blocks();
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = packed ? drop_kernel<T, true> : drop_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream>>>(
      work, static_cast<ComputeType<T>>(drop.scale), memory);
  return cudaGetLastError();
}

}  // namespace

int dare_cuda(const void* expert, const void* base, void* out, DType dtype, int64_t count,
              const Drop& drop, void* stream) {
  if (count == 0) return cudaSuccess;
  const DeviceMemory memory = {expert, base, out};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat16:
      return launch<DeviceFloat16>(memory, count, drop, on);
    case DType::kBFloat16:
      return launch<DeviceBFloat16>(memory, count, drop, on);
    case DType::kFloat32:
      return launch<float>(memory, count, drop, on);
    case DType::kFloat64:
      return launch<double>(memory, count, drop, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nlm
