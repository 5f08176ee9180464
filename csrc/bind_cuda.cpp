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
#include "dare.h"
#include "inner_products.h"
#include "magnitude_threshold.h"
#include "permute.h"
#include "scale_shift.h"
#include "sign_merge.h"
#include "tall_mask.h"
#include "weighted_sum.h"

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

void bind_magnitude_threshold(py::module_& m) {
  m.def("magnitude_threshold_scratch", &magnitude_threshold_scratch);
  m.def(
      "magnitude_threshold",
      [](const std::vector<MagnitudeTuple>& tuples, int64_t rank, int result_dtype, Address result,
         Address scratch, Address stream) {
        const std::vector<MagnitudeItem> items = to_magnitude_items(tuples);
        check(magnitude_threshold_cuda(items.data(), static_cast<int64_t>(items.size()), rank,
                                       static_cast<DType>(result_dtype), pointer<void>(result),
                                       pointer<void>(scratch), pointer<void>(stream)),
              "magnitude_threshold");
      },
      Released());
}

void bind_sign_merge(py::module_& m) {
  m.def(
      "sign_merge",
      [](const SignMergeTuple& tuple, const std::vector<WeightedTuple>& experts, Address ballot,
         Address stream) {
        const std::vector<WeightedTensor> each = to_weighted_tensors(experts);
        check(sign_merge_cuda(to_sign_merge_item(tuple, each), pointer<int64_t>(ballot),
                              pointer<void>(stream)),
              "sign_merge");
      },
      Released());
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

void bind_tall_mask(py::module_& m) {
  m.def(
      "tall_mask",
      [](Address expert, Address base, Address merged, int dtype, int64_t count, double limit,
         Address mask, Address stream) {
        check(tall_mask_cuda(pointer<void>(expert), pointer<void>(base), pointer<void>(merged),
                             static_cast<DType>(dtype), count, limit, pointer<uint8_t>(mask),
                             pointer<void>(stream)),
              "tall_mask");
      },
      Released());
  m.def(
      "tall_mask_apply",
      [](Address mask, Address base, Address merged, int element_bytes, int64_t count, Address out,
         Address stream) {
        check(
            tall_mask_apply_cuda(pointer<uint8_t>(mask), pointer<void>(base), pointer<void>(merged),
                                 element_bytes, count, pointer<void>(out), pointer<void>(stream)),
            "tall_mask_apply");
      },
      Released());
  m.def("tall_mask_walks", &tall_mask_walks);
  m.def(
      "tall_mask_agreement",
      [](Address masks, int64_t tasks, int64_t bytes, int64_t least, Address kept, Address counts,
         Address stream) {
        check(tall_mask_agreement_cuda(pointer<uint8_t>(masks), tasks, bytes, least,
                                       pointer<uint8_t>(kept), pointer<int64_t>(counts),
                                       pointer<void>(stream)),
              "tall_mask_agreement");
      },
      Released());
}

void bind_dare(py::module_& m) {
  m.def(
      "dare",
      [](Address expert, Address base, Address out, int dtype, int64_t count, uint64_t seed,
         int64_t offset, uint32_t threshold, double scale, Address stream) {
        check(dare_cuda(pointer<void>(expert), pointer<void>(base), pointer<void>(out),
                        static_cast<DType>(dtype), count, {seed, offset, threshold, scale},
                        pointer<void>(stream)),
              "dare");
      },
      Released());
}

void bind_inner_products(py::module_& m) {
  m.def("inner_products_rows", [](int64_t size, int dtype) {
    return inner_products_rows(size, static_cast<DType>(dtype));
  });
  m.def(
      "inner_products",
      [](Address base, int dtype, const std::vector<PackedTuple>& tensors, int64_t size,
         Address partial, Address stream) {
        const std::vector<PackedTensor> each = to_packed_tensors(tensors);
        check(inner_products_cuda({pointer<void>(base), static_cast<DType>(dtype), each.data(),
                                   static_cast<int>(each.size()), size},
                                  pointer<double>(partial), pointer<void>(stream)),
              "inner_products");
      },
      Released());
}

void bind_weighted_sum(py::module_& m) {
  m.def(
      "weighted_sum",
      [](Address base, int base_dtype, const std::vector<WeightedTuple>& tensors, double divisor,
         double scale, Address target, int target_dtype, int64_t size, Address stream) {
        const std::vector<WeightedTensor> each = to_weighted_tensors(tensors);
        check(weighted_sum_cuda({pointer<void>(base), static_cast<DType>(base_dtype), each.data(),
                                 static_cast<int>(each.size()), divisor, scale,
                                 pointer<void>(target), static_cast<DType>(target_dtype), size},
                                pointer<void>(stream)),
              "weighted_sum");
      },
      Released());
}

}  // namespace
}  // namespace nlm

PYBIND11_MODULE(_C_cuda, m) {
  nlm::bind_magnitude_threshold(m);
  nlm::bind_permute(m);
  nlm::bind_scale_shift(m);
  nlm::bind_sign_merge(m);
  nlm::bind_dare(m);
  nlm::bind_tall_mask(m);
  nlm::bind_inner_products(m);
  nlm::bind_weighted_sum(m);
}
