// Gathers axes of a list of tensors on the GPU, one launch per tensor. The work is
// permute_body.h's.
//
// One read and one write of every tensor, in words of 16 bytes where the layout allows.
#define NLM_ISA device

#include <cuda_runtime.h>

#include <cstdio>

#include "permute_body.h"

namespace nlm {

using namespace device;

namespace {

struct DeviceMemory {
  const Plan& plan;

  template <class T>
  NLM_DEVICE const T* source() const {
    return static_cast<const T*>(plan.source);
  }
  template <class T>
  NLM_DEVICE T* target() const {
    return static_cast<T*>(plan.target);
  }
  NLM_DEVICE const int64_t* index(int a) const { return plan.axes[a].index; }
  template <class T>
  NLM_DEVICE T* shared() const {
#if defined(__CUDA_ARCH__)
    extern __shared__ Word16 staged[];
    return reinterpret_cast<T*>(staged);
#else
    return nullptr;
#endif
  }
  // As PyTorch's own indexing: the kernel stops, and the next synchronisation raises.
  NLM_DEVICE void fail() const {
#if defined(__CUDA_ARCH__)
    printf("nlm.permute: the values of an index must lie in the axis that they index\n");
    __trap();
#endif
  }
};

template <class T, int kPack, Columns kColumns, class Write>
__global__ void __launch_bounds__(kBlockThreads, kColumns == Columns::kStaged ? 4 : 3)
    permute_kernel(const __grid_constant__ PermuteGrid work, const Write write) {
  const DeviceMemory memory = {work.plan};
  if constexpr (kColumns == Columns::kStaged) {
    stage_body<T>(work, blockIdx.x, threadIdx.x, memory);
    __syncthreads();
  }
  permute_body<T, kPack, kColumns>(work, blockIdx.x, threadIdx.x, memory, write);
}

template <class T, int kPack, Columns kColumns, class Write>
cudaError_t launch(const PermuteGrid& work, const Write& write, cudaStream_t stream) {
  if (work.grid.blocks() > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = permute_kernel<T, kPack, kColumns, Write>;
  const int shared = static_cast<int>(shared_bytes(work, sizeof(T)));
  if (shared > (48 << 10)) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(work.grid.blocks()), kBlockThreads, shared, stream>>>(work, write);
  return cudaGetLastError();
}

template <class T, int kPack, class Write>
cudaError_t launch_gather(const PermuteGrid& work, const Write& write, cudaStream_t stream) {
  return columns_of(work) == Columns::kStaged
             ? launch<T, kPack, Columns::kStaged>(work, write, stream)
             : launch<T, kPack, Columns::kGathered>(work, write, stream);
}

template <class T, class Write>
cudaError_t launch(const Plan& plan, const Write& write, cudaStream_t stream) {
  if (plan.elements == 0) return cudaSuccess;
  constexpr int kPack = kPackOf<sizeof(T)>;
  int pack = 0;
  const PermuteGrid work = make_permute_grid(plan, sizeof(T), kPack, pack);
  if (!work.gathers) return launch<T, 1, Columns::kCopied>(work, write, stream);
  return pack == kPack ? launch_gather<T, kPack>(work, write, stream)
                       : launch_gather<T, 1>(work, write, stream);
}

cudaError_t copy(const PermuteItem& item, int element_bytes, cudaStream_t stream) {
  Plan plan;
  make_plan(item, plan);
  switch (widen_words(plan, element_bytes)) {
    case 1:
      return launch<uint8_t>(plan, WriteCopy<uint8_t>{}, stream);
    case 2:
      return launch<uint16_t>(plan, WriteCopy<uint16_t>{}, stream);
    case 4:
      return launch<uint32_t>(plan, WriteCopy<uint32_t>{}, stream);
    case 8:
      return launch<uint64_t>(plan, WriteCopy<uint64_t>{}, stream);
    case 16:
      return launch<Word16>(plan, WriteCopy<Word16>{}, stream);
  }
  return cudaErrorInvalidValue;
}

template <class T, class Compute>
cudaError_t add(const PermuteItem& item, double weight, cudaStream_t stream) {
  Plan plan;
  make_plan(item, plan);
  return launch<T>(plan, WriteSum<T, Compute>{static_cast<Compute>(weight)}, stream);
}

cudaError_t add(const PermuteItem& item, DType dtype, double weight, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat16:
      return add<DeviceFloat16, float>(item, weight, stream);
    case DType::kBFloat16:
      return add<DeviceBFloat16, float>(item, weight, stream);
    case DType::kFloat32:
      return add<float, float>(item, weight, stream);
    case DType::kFloat64:
      return add<double, double>(item, weight, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int permute_cuda(const PermuteItem* items, const int* element_bytes, int64_t count, void* stream) {
  for (int64_t t = 0; t < count; ++t) {
    const cudaError_t error = copy(items[t], element_bytes[t], static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int permute_add_cuda(const PermuteItem* items, const DType* dtypes, const double* weights,
                     int64_t count, void* stream) {
  for (int64_t t = 0; t < count; ++t) {
    const cudaError_t error =
        add(items[t], dtypes[t], weights[t], static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace nlm
