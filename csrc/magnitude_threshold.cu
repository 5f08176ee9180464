// The k-th largest |values - base| of a list of tensors on the GPU. The work is
// magnitude_threshold_body.h's.
//
// Three reads of the values and of the base for a float32 result, six for a float64 one; nothing is
// copied to the host.
#define NLM_ISA device

#include <cuda_runtime.h>

#include "magnitude_threshold_body.h"

namespace nlm {

using namespace device;

namespace {

struct CountMemory {
  const CountGrid& work;
  MagnitudeState* state;
  uint32_t* digits;  // shared

  template <class T>
  NLM_DEVICE const T* values(int span) const {
    return static_cast<const T*>(work.spans[span].values);
  }
  template <class T>
  NLM_DEVICE const T* base(int span) const {
    return static_cast<const T*>(work.spans[span].base);
  }
  NLM_DEVICE uint64_t prefix() const { return state->prefix; }
  NLM_DEVICE uint32_t& digit(int d) const { return digits[d]; }
  __device__ void count(int d) const { atomicAdd(digits + d, 1u); }
  __device__ void add(int d, uint32_t count) const {
    atomicAdd(state->counts + d, static_cast<unsigned long long>(count));
  }
};

struct PickMemory {
  MagnitudeState* state;
  uint64_t* groups;  // shared
  void* result_data;

  NLM_DEVICE unsigned long long& total(int d) const { return state->counts[d]; }
  NLM_DEVICE uint64_t& group(int g) const { return groups[g]; }
  NLM_DEVICE uint64_t& rank() const { return state->rank; }
  NLM_DEVICE uint64_t& prefix() const { return state->prefix; }
  template <class T>
  NLM_DEVICE T* result() const {
    return static_cast<T*>(result_data);
  }
};

template <class T, class Word>
__global__ void __launch_bounds__(kBlockThreads)
    count_kernel(const __grid_constant__ CountGrid work, MagnitudeState* state) {
  __shared__ uint32_t digits[kDigits];
  const CountMemory memory = {work, state, digits};
  clear_phase(threadIdx.x, memory);
  __syncthreads();
  count_phase<T, Word>(work, blockIdx.x, threadIdx.x, memory);
  __syncthreads();
  flush_phase(threadIdx.x, memory);
}

template <class Word>
__global__ void __launch_bounds__(kBlockThreads)
    pick_kernel(const PickGrid work, MagnitudeState* state, void* result) {
  __shared__ uint64_t groups[kBlockThreads];
  const PickMemory memory = {state, groups, result};
  group_phase(threadIdx.x, memory);
  __syncthreads();
  pick_phase<Word>(work, threadIdx.x, memory);
  __syncthreads();
  forget_phase(threadIdx.x, memory);
}

struct Launch {
  MagnitudeState* state;
  void* result;
  cudaStream_t stream;

  template <class T, class Word>
  int count(const CountGrid& work, int64_t blocks) const {
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    count_kernel<T, Word><<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream>>>(work, state);
    return cudaGetLastError();
  }
  template <class Word>
  int pick(const PickGrid& work) const {
    pick_kernel<Word><<<1, kBlockThreads, 0, stream>>>(work, state, result);
    return cudaGetLastError();
  }
};

}  // namespace

int64_t magnitude_threshold_scratch() { return sizeof(MagnitudeState); }

int magnitude_threshold_cuda(const MagnitudeItem* items, int64_t count, int64_t rank,
                             DType result_dtype, void* result, void* scratch, void* stream) {
  const Launch launch = {static_cast<MagnitudeState*>(scratch), result,
                         static_cast<cudaStream_t>(stream)};
  return result_dtype == DType::kFloat64 ? select_magnitude<uint64_t>(items, count, rank, launch)
                                         : select_magnitude<uint32_t>(items, count, rank, launch);
}

}  // namespace nlm
