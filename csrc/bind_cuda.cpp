// The Python module nlm._C_cuda: launches the CUDA kernels. Linked with a static cudart, so that it
// imports without a driver. Launches go to the current device.
//
// Arguments are as in bind.cpp, with a stream's address instead of a number of threads. A launch is
// asynchronous: what was allocated on that stream may be freed right after the call.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "permute.h"
#include "scale_shift.h"

namespace py = pybind11;

namespace nlm {
namespace {

using Released = py::call_guard<py::gil_scoped_release>;

void check(int error, const char* operation) {
  if (error == cudaSuccess) return;
  const char* text = cudaGetErrorString(static_cast<cudaError_t>(error));
  throw std::runtime_error(std::string("nlm.") + operation + ": the CUDA launch failed: " + text);
}

Tasks to_tasks(Address ids, int64_t count, int64_t outer_per_sample) {
  return {pointer<int64_t>(ids), count, outer_per_sample};
}

void bind_permute(py::module_& m) {
  m.def(
      "permute",
      [](const std::vector<PermuteTuple>& tuples, const std::vector<int>& element_bytes,
         Address stream) {
        const std::vector<PermuteItem> items = to_items(tuples);
        check(permute_cuda(items.data(), element_bytes.data(), static_cast<int64_t>(items.size()),
                           pointer<void>(stream)),
              "permute");
      },
      Released());
  m.def(
      "permute_add",
      [](const std::vector<PermuteTuple>& tuples, const std::vector<int>& dtypes,
         const std::vector<double>& weights, Address stream) {
        const std::vector<PermuteItem> items = to_items(tuples);
        std::vector<DType> types;
        for (const int dtype : dtypes) types.push_back(static_cast<DType>(dtype));
        check(permute_add_cuda(items.data(), types.data(), weights.data(),
                               static_cast<int64_t>(items.size()), pointer<void>(stream)),
              "permute_add_");
      },
      Released());
}

void bind_scale_shift(py::module_& m) {
  m.def(
      "scale_shift",
      [](const ViewTuple& x, const ViewTuple& y, Address scale, Address shift, Address task_ids,
         int64_t task_count, int64_t outer_per_sample, Address stream) {
        check(scale_shift_cuda(to_view(x), to_view(y), pointer<void>(scale), pointer<void>(shift),
                               to_tasks(task_ids, task_count, outer_per_sample),
                               pointer<void>(stream)),
              "scale_shift");
      },
      Released());
  m.def("scale_shift_partial_rows", [](const ViewTuple& x, int64_t task_count) {
    return scale_shift_partial_rows(to_view(x), task_count);
  });
  m.def(
      "scale_shift_backward",
      [](const ViewTuple& grad, const ViewTuple& x, const ViewTuple& grad_x, Address scale,
         Address task_ids, int64_t task_count, int64_t outer_per_sample, Address partial_scale,
         Address partial_shift, Address stream) {
        check(scale_shift_backward_cuda(
                  to_view(grad), to_view(x), to_view(grad_x), pointer<void>(scale),
                  to_tasks(task_ids, task_count, outer_per_sample), pointer<double>(partial_scale),
                  pointer<double>(partial_shift), pointer<void>(stream)),
              "scale_shift_backward");
      },
      Released());
}

}  // namespace
}  // namespace nlm

PYBIND11_MODULE(_C_cuda, m) {
  nlm::bind_permute(m);
  nlm::bind_scale_shift(m);
}
