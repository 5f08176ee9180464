// y = x * scale[t, c] + shift[t, c] and its gradients. See scale_shift.cpp.
#pragma once

#include "core/view.h"

namespace nlm {

// The task of each sample: sample n is the outer indices [n * outer_per_sample, ...). Null `ids`:
// task 0 for all. The caller has checked that 0 <= id < count.
struct Tasks {
  const int64_t* ids;
  int64_t count;
  int64_t outer_per_sample;
};

// y has the shape of x, any strides that do not overlap, and may be x itself. scale and shift are
// [tasks.count, channels], packed, in float64 for float64 x, else in float32.
NLM_KERNEL(void, scale_shift,
           (const View3& x, const View3& y, const void* scale, const void* shift,
            const Tasks& tasks, int threads));

// grad_x = grad * scale; grad_scale[t, c] = sum of grad * x and grad_shift[t, c] = sum of grad over
// the positions of task t, both float64 [tasks.count, channels], overwritten.
NLM_KERNEL(void, scale_shift_backward,
           (const View3& grad, const View3& x, const View3& grad_x, const void* scale,
            const Tasks& tasks, double* grad_scale, double* grad_shift, int threads));

// The same on the GPU (scale_shift.cu): device pointers, launched on `stream`, a cudaStream_t. The
// result is a cudaError_t. Nothing is waited for or allocated; a task id out of range gives NaN.
int scale_shift_cuda(const View3& x, const View3& y, const void* scale, const void* shift,
                     const Tasks& tasks, void* stream);

// partial_scale and partial_shift are float64 [rows, tasks.count, channels], overwritten; their
// sums over the rows, scale_shift_partial_rows(x, tasks.count) of them, are the gradients.
int64_t scale_shift_partial_rows(const View3& x, int64_t tasks);
int scale_shift_backward_cuda(const View3& grad, const View3& x, const View3& grad_x,
                              const void* scale, const Tasks& tasks, double* partial_scale,
                              double* partial_shift, void* stream);

}  // namespace nlm
