// The weighted sum on the GPU. The work is weighted_sum_body.h's.
//
// One read of the base and of each tensor, one write. Every operation is rounded by itself, as on
// the CPU.
#define NLM_ISA device

#include <cuda_runtime.h>

#include "weighted_sum_body.h"

namespace nlm {

using namespace device;

namespace {

// At most 48 registers for each thread.
constexpr int kBlocksPerProcessor = 5;

struct DeviceMemory {
  const SumGrid& work;

  template <class T>
  NLM_DEVICE const T* base() const {
    return static_cast<const T*>(work.base);
  }
  template <class T>
  NLM_DEVICE const T* tensor(int k) const {
    return static_cast<const T*>(work.tensors[k]);
  }
  template <class T>
  NLM_DEVICE T* target() const {
    return static_cast<T*>(work.target);
  }
};

template <class T, bool kPacked>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    sum_kernel(const __grid_constant__ SumGrid work) {
  sum_body<T, kPacked>(work, blockIdx.x, threadIdx.x, DeviceMemory{work});
}

template <class T>
cudaError_t launch(const WeightedSum& sum, cudaStream_t stream) {
  bool packed = false;
  const SumGrid work = make_sum_grid<T>(sum, packed);
  const int64_t blocks = work.grid.blocks();
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = packed ? sum_kernel<T, true> : sum_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream>>>(work);
  return cudaGetLastError();
}

}  // namespace

int weighted_sum_cuda(const WeightedSum& work, void* stream) {
  if (work.size == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (work.target_dtype) {
    case DType::kFloat16:
      return launch<DeviceFloat16>(work, on);
    case DType::kBFloat16:
      return launch<DeviceBFloat16>(work, on);
    case DType::kFloat32:
      return launch<float>(work, on);
    case DType::kFloat64:
      return launch<double>(work, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nlm
