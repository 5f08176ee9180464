// TIES' trimming, election and disjoint mean on the GPU. The work is sign_merge_body.h's.
//
// One read of the base and of each expert, one write. Every operation is rounded by itself, as on
// the CPU.
#define NLM_ISA device

#include <cuda_runtime.h>

#include "sign_merge_body.h"

namespace nlm {

using namespace device;

namespace {

// At most 48 registers for each thread.
constexpr int kBlocksPerProcessor = 5;

struct DeviceMemory {
  const MergeGrid& work;
  int* counts;  // shared
  int64_t* ballot;

  template <class T>
  NLM_DEVICE const T* base() const {
    return static_cast<const T*>(work.base);
  }
  template <class T>
  NLM_DEVICE const T* expert(int k) const {
    return static_cast<const T*>(work.experts[k]);
  }
  template <class T>
  NLM_DEVICE const T* thresholds() const {
    return static_cast<const T*>(work.thresholds);
  }
  template <class T>
  NLM_DEVICE T* target() const {
    return static_cast<T*>(work.target);
  }
  NLM_DEVICE uint8_t* contested() const { return work.contested; }
  NLM_DEVICE int& shared(int i) const { return counts[i]; }
  __device__ void add_shared(int i, int count) const { atomicAdd(counts + i, count); }
  __device__ void add_ballot(int i, int count) const {  // two's complement: a sum of either sign
    atomicAdd(reinterpret_cast<unsigned long long*>(ballot + i),
              static_cast<unsigned long long>(static_cast<long long>(count)));
  }
};

template <class T, SignDialect kDialect>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    merge_kernel(const __grid_constant__ MergeGrid work, int64_t* ballot) {
  __shared__ int counts[2];
  const DeviceMemory memory = {work, counts, ballot};
  if constexpr (kDialect != SignDialect::kGlobal) {
    merge_phase<T, kDialect>(work, blockIdx.x, threadIdx.x, memory);
  } else {
    open_phase(threadIdx.x, memory);
    __syncthreads();
    merge_phase<T, kDialect>(work, blockIdx.x, threadIdx.x, memory);
    __syncthreads();
    close_phase(threadIdx.x, memory);
  }
}

template <class T>
cudaError_t launch(const SignMergeItem& item, int64_t* ballot, cudaStream_t stream) {
  const MergeGrid work = make_merge_grid<T>(item);
  const int64_t blocks = merge_blocks(work, kMergePack<T>);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = item.dialect == SignDialect::kGlobal ? merge_kernel<T, SignDialect::kGlobal>
                      : item.dialect == SignDialect::kPeft
                          ? merge_kernel<T, SignDialect::kPeft>
                          : merge_kernel<T, SignDialect::kMergekit>;
  kernel<<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream>>>(work, ballot);
  return cudaGetLastError();
}

}  // namespace

int sign_merge_cuda(const SignMergeItem& item, int64_t* ballot, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (item.dtype) {
    case DType::kFloat16:
      return launch<DeviceFloat16>(item, ballot, on);
    case DType::kBFloat16:
      return launch<DeviceBFloat16>(item, ballot, on);
    case DType::kFloat32:
      return launch<float>(item, ballot, on);
    case DType::kFloat64:
      return launch<double>(item, ballot, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nlm
