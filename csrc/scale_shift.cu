// y = x * scale[t, c] + shift[t, c] and its gradients on the GPU. The work is in the bodies.
//
// One read of x and one write of y; backward two reads and one write. Multiplication and addition
// round separately, as on the CPU.
#define NLM_ISA device

#include <cuda_runtime.h>

#include "scale_shift_backward_body.h"
#include "scale_shift_body.h"

namespace nlm {

using namespace device;

namespace {

struct DeviceMemory {
  DeviceAddress grad, x, scale, shift;
  DeviceAddress result;  // y, or the gradient for x
  DeviceAddress task_ids, grad_scale, grad_shift;

  template <class T>
  NLM_DEVICE T* shared() const {
#if defined(__CUDA_ARCH__)
    extern __shared__ SumPair slots[];
    return reinterpret_cast<T*>(slots);
#else
    return nullptr;
#endif
  }
};

template <class T, int kPack>
__global__ void __launch_bounds__(kBlockThreads)
    forward_kernel(const __grid_constant__ ForwardGrid work, const DeviceMemory memory) {
  forward_body<T, kPack>(work, blockIdx.x, threadIdx.x, memory);
}

template <class T, int kPack, int kSums, bool kWide>
__global__ void __launch_bounds__(kBlockThreads, 3)
    backward_kernel(const __grid_constant__ BackwardGrid work, const DeviceMemory memory) {
  backward_body<T, kPack, kSums, kWide>(work, blockIdx.x, threadIdx.x, memory);
  __syncthreads();
  backward_sums_body<kSums>(work, blockIdx.x, threadIdx.x, memory);
}

template <class T>
cudaError_t forward(const View3& x, const View3& y, const DeviceMemory& memory, const Tasks& tasks,
                    cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  int pack = 0;
  const ForwardGrid work =
      make_forward_grid(x, y, memory.scale.data, memory.shift.data, tasks, sizeof(T), pack);
  const int64_t blocks = work.grid.blocks();
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = pack == kPack ? forward_kernel<T, kPack> : forward_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream>>>(work, memory);
  return cudaGetLastError();
}

template <class T>
cudaError_t backward(const View3& grad, const View3& x, const View3& grad_x, const Tasks& tasks,
                     const DeviceMemory& memory, cudaStream_t stream) {
  const BackwardGrid work = make_backward_grid(grad, x, grad_x, tasks);
  if (work.blocks() > INT32_MAX) return cudaErrorInvalidConfiguration;
  return with_pack<T>(work, [&](auto pack, auto sums, auto wide) {
    const auto kernel = backward_kernel<T, pack(), sums(), wide()>;
    const int shared = work.shared_bytes();
    if (shared > (48 << 10)) {
      const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
      if (error != cudaSuccess) return error;
    }
    kernel<<<static_cast<unsigned>(work.blocks()), kBlockThreads, shared, stream>>>(work, memory);
    return cudaGetLastError();
  });
}

}  // namespace

int scale_shift_cuda(const View3& x, const View3& y, const void* scale, const void* shift,
                     const Tasks& tasks, void* stream) {
  if (x.empty()) return cudaSuccess;
  const DeviceMemory memory = {nullptr, x.data, scale, shift, y.data, tasks.ids, nullptr, nullptr};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (x.dtype) {
    case DType::kFloat16:
      return forward<DeviceFloat16>(x, y, memory, tasks, on);
    case DType::kBFloat16:
      return forward<DeviceBFloat16>(x, y, memory, tasks, on);
    case DType::kFloat32:
      return forward<float>(x, y, memory, tasks, on);
    case DType::kFloat64:
      return forward<double>(x, y, memory, tasks, on);
  }
  return cudaErrorInvalidValue;
}

int64_t scale_shift_partial_rows(const View3& x, int64_t tasks) {
  if (x.empty()) return 0;
  return make_backward_grid(x, x, x, {nullptr, tasks, 1}).walk_blocks;
}

int scale_shift_backward_cuda(const View3& grad, const View3& x, const View3& grad_x,
                              const void* scale, const Tasks& tasks, double* partial_scale,
                              double* partial_shift, void* stream) {
  if (x.empty()) return cudaSuccess;
  const DeviceMemory memory = {grad.data,   x.data,    scale,         nullptr,
                               grad_x.data, tasks.ids, partial_scale, partial_shift};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (x.dtype) {
    case DType::kFloat16:
      return backward<DeviceFloat16>(grad, x, grad_x, tasks, memory, on);
    case DType::kBFloat16:
      return backward<DeviceBFloat16>(grad, x, grad_x, tasks, memory, on);
    case DType::kFloat32:
      return backward<float>(grad, x, grad_x, tasks, memory, on);
    case DType::kFloat64:
      return backward<double>(grad, x, grad_x, tasks, memory, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nlm
