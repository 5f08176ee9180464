// Inner products on the GPU. The work is inner_products_body.h's.
//
// One read of the base and of each tensor from memory. The order of all sums is fixed: the result
// is the same in every bit on every run.
#define NLM_ISA device

#include <cuda_runtime.h>

#include "inner_products_body.h"

namespace nlm {

using namespace device;

namespace {

struct DeviceMemory {
  const ProductGrid& work;
  double* sums;  // shared
  double* rows;

  template <class T>
  NLM_DEVICE const T* base() const {
    return static_cast<const T*>(work.base);
  }
  template <class T>
  NLM_DEVICE const T* tensor(int k) const {
    return static_cast<const T*>(work.tensors[k]);
  }
  NLM_DEVICE double& shared(int i) const { return sums[i]; }
  NLM_DEVICE double* partial() const { return rows; }
};

template <class T, bool kPacked>
__global__ void __launch_bounds__(kBlockThreads)
    products_kernel(const __grid_constant__ ProductGrid work, double* partial) {
  __shared__ double sums[kTileProducts * kBlockThreads];
  const DeviceMemory memory = {work, sums, partial};
  for (int64_t segment = blockIdx.x; segment < work.segments; segment += gridDim.x) {
    for (Tile tile = {0, 0}; tile.row < work.count; tile = next_tile(tile, work.count)) {
      multiply_phase<T, kPacked>(work, segment, tile, threadIdx.x, memory);
      __syncthreads();
      fold_phase(threadIdx.x, memory);
      __syncthreads();
      add_phase(work, blockIdx.x, tile, threadIdx.x, memory);
      __syncthreads();
    }
  }
}

template <class T>
cudaError_t launch(const VectorSet& set, double* partial, cudaStream_t stream) {
  bool packed = false;
  const ProductGrid work = make_product_grid<T>(set, packed);
  const auto kernel = packed ? products_kernel<T, true> : products_kernel<T, false>;
  const auto blocks = static_cast<unsigned>(product_rows<T>(set.size));
  kernel<<<blocks, kBlockThreads, 0, stream>>>(work, partial);
  return cudaGetLastError();
}

}  // namespace

int64_t inner_products_rows(int64_t size, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return product_rows<DeviceFloat16>(size);
    case DType::kFloat32:
      return product_rows<float>(size);
    case DType::kFloat64:
      return product_rows<double>(size);
  }
  return 0;
}

int inner_products_cuda(const VectorSet& set, double* partial, void* stream) {
  if (set.size == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (set.base_dtype) {
    case DType::kFloat16:
      return launch<DeviceFloat16>(set, partial, on);
    case DType::kBFloat16:
      return launch<DeviceBFloat16>(set, partial, on);
    case DType::kFloat32:
      return launch<float>(set, partial, on);
    case DType::kFloat64:
      return launch<double>(set, partial, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nlm
