// The Python module nlm._C. No other C++ file knows Python.
//
// Every function takes addresses, sizes and strides as integers that nlm/_native.py makes from
// tensors which nlm/ops has checked, and releases the GIL for the whole call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#if defined(NLM_STD_THREADS)
#include <thread>
#endif
#include <tuple>
#include <vector>

#include "arguments.h"
#include "assignment.h"
#include "channel_moments.h"
#include "core/bus_error.h"
#include "core/isa.h"
#include "core/pages.h"
#include "core/view.h"
#include "cross_moments.h"
#include "dare.h"
#include "group_similarity.h"
#include "inner_products.h"
#include "magnitude_threshold.h"
#include "magprune.h"
#include "permute.h"
#include "scale_shift.h"
#include "sign_merge.h"
#include "tall_mask.h"
#include "weighted_sum.h"

namespace py = pybind11;

namespace nlm {

int active_isa = -1;

#if defined(NLM_STD_THREADS)
void run_team(int threads, void (*body)(void*, int), void* context) {
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, context, thread);
  body(context, 0);
  for (auto& each : others) each.join();
}
#endif

namespace {

using Released = py::call_guard<py::gil_scoped_release>;

// The instruction set that NLM_ISA names, else the best one of the machine.
void choose_isa() {
  const int best = best_isa();
  if (best < 0) {
    throw py::import_error(std::string("nlm: this processor lacks ") + kIsaNames[0] +
                           ", the smallest instruction set that the compiled core supports");
  }
  active_isa = best;
  const char* forced = std::getenv("NLM_ISA");
  if (forced == nullptr || *forced == '\0') return;
  for (int i = 0; i <= best; ++i) {
    if (std::string(forced) == kIsaNames[i]) {
      active_isa = i;
      return;
    }
  }
  std::string runnable;
  for (int i = 0; i <= best; ++i) runnable += std::string(i ? ", " : "") + kIsaNames[i];
  throw py::value_error("nlm: NLM_ISA must be an instruction set that this machine runs (" +
                        runnable + "), got " + forced);
}

void bind_assignment(py::module_& m) {
  m.def(
      "assignment",
      [](const ViewTuple& costs, int64_t groups, int64_t group_stride, bool maximize,
         Address columns, Address row_duals, Address column_duals, bool warm, Address changed,
         int threads) {
        return select(assignment_clones)(
            to_view(costs), groups, group_stride, maximize,
            {pointer<int64_t>(columns), pointer<double>(row_duals), pointer<double>(column_duals),
             warm, pointer<uint8_t>(changed)},
            threads);
      },
      Released());
}

void bind_channel_moments(py::module_& m) {
  m.def(
      "channel_moments",
      [](const ViewTuple& x, const MaskTuple& mask, Address count, Address mean, Address m2,
         int threads) {
        select(channel_moments_clones)(to_view(x), to_mask(mask), pointer<int64_t>(count),
                                       pointer<double>(mean), pointer<double>(m2), threads);
      },
      Released());
}

void bind_scale_shift(py::module_& m) {
  m.def(
      "scale_shift",
      [](const ViewTuple& x, const ViewTuple& y, Address scale, Address shift, Address task_ids,
         int64_t task_count, int64_t outer_per_sample, int threads) {
        select(scale_shift_clones)(
            to_view(x), to_view(y), pointer<void>(scale), pointer<void>(shift),
            {pointer<int64_t>(task_ids), task_count, outer_per_sample}, threads);
      },
      Released());
  m.def(
      "scale_shift_backward",
      [](const ViewTuple& grad, const ViewTuple& x, const ViewTuple& grad_x, Address scale,
         Address task_ids, int64_t task_count, int64_t outer_per_sample, Address grad_scale,
         Address grad_shift, int threads) {
        select(scale_shift_backward_clones)(
            to_view(grad), to_view(x), to_view(grad_x), pointer<void>(scale),
            {pointer<int64_t>(task_ids), task_count, outer_per_sample}, pointer<double>(grad_scale),
            pointer<double>(grad_shift), threads);
      },
      Released());
}

void bind_sign_merge(py::module_& m) {
  m.def(
      "sign_merge",
      [](const SignMergeTuple& tuple, const std::vector<WeightedTuple>& experts, Address ballot,
         int threads) {
        const std::vector<WeightedTensor> each = to_weighted_tensors(experts);
        select(sign_merge_clones)(to_sign_merge_item(tuple, each), pointer<int64_t>(ballot),
                                  threads);
      },
      Released());
}

void bind_cross_moments(py::module_& m) {
  m.def(
      "cross_moments",
      [](const ViewTuple& x, const std::optional<ViewTuple>& y, const MaskTuple& mask,
         int precision, Address count, Address mean_x, Address m2_x, Address mean_y, Address m2_y,
         Address comoment, int threads) {
        const CrossMomentsState state = {pointer<int64_t>(count), pointer<double>(mean_x),
                                         pointer<double>(m2_x),   pointer<double>(mean_y),
                                         pointer<double>(m2_y),   pointer<double>(comoment)};
        const View3 second = y ? to_view(*y) : View3{};
        select(cross_moments_clones)(to_view(x), y ? &second : nullptr, to_mask(mask),
                                     static_cast<Precision>(precision), state, threads);
      },
      Released());
}

void bind_magnitude_threshold(py::module_& m) {
  m.def(
      "magnitude_threshold",
      [](const std::vector<MagnitudeTuple>& tuples, int64_t rank, int result_dtype, Address result,
         int threads) {
        const std::vector<MagnitudeItem> items = to_magnitude_items(tuples);
        select(magnitude_threshold_clones)(items.data(), static_cast<int64_t>(items.size()), rank,
                                           static_cast<DType>(result_dtype), pointer<void>(result),
                                           threads);
      },
      Released());
}

// (data, offsets of batches, rows and terms, number of rows, step of the terms' offsets).
using OperandTuple = std::tuple<Address, Address, Address, Address, int64_t, int64_t>;

SimilarityOperand to_operand(const OperandTuple& t) {
  const auto [data, batch, row, term, rows, term_step] = t;
  return {pointer<void>(data),
          pointer<int64_t>(batch),
          pointer<int64_t>(row),
          pointer<int64_t>(term),
          rows,
          term_step};
}

SimilarityOut to_similarity(const std::array<Address, 4>& t) {
  return {pointer<double>(t[0]), pointer<int64_t>(t[1]), pointer<int64_t>(t[2]),
          pointer<int64_t>(t[3])};
}

void bind_group_similarity(py::module_& m) {
  m.def(
      "group_similarity",
      [](const OperandTuple& a, const OperandTuple& b, const std::array<Address, 4>& out, int dtype,
         int64_t batches, int64_t terms, double weight, int threads) {
        select(group_similarity_clones)(to_operand(a), to_operand(b), to_similarity(out),
                                        static_cast<DType>(dtype), batches, terms, weight, threads);
      },
      Released());
  m.def(
      "similarity_gather",
      [](const OperandTuple& operand, int dtype, int64_t batch, int64_t begin, int64_t end,
         bool transposed, Address target, int threads) {
        select(similarity_gather_clones)(to_operand(operand), static_cast<DType>(dtype), batch,
                                         begin, end, transposed, pointer<void>(target), threads);
      },
      Released());
  m.def(
      "similarity_add",
      [](const std::array<Address, 4>& out, int64_t batch, int64_t begin, int64_t end,
         int64_t columns, Address product, bool wide, double weight, int threads) {
        select(similarity_add_clones)(to_similarity(out), batch, begin, end, columns,
                                      pointer<void>(product), wide, weight, threads);
      },
      Released());
}

void bind_permute(py::module_& m) {
  m.def(
      "permute",
      [](const std::vector<PermuteTuple>& tuples, const std::vector<int>& element_bytes,
         int threads) {
        const std::vector<PermuteItem> items = to_items(tuples);
        select(permute_clones)(items.data(), element_bytes.data(),
                               static_cast<int64_t>(items.size()), threads);
      },
      Released());
  m.def(
      "permute_add",
      [](const std::vector<PermuteTuple>& tuples, const std::vector<int>& dtypes,
         const std::vector<double>& weights, int threads) {
        const std::vector<PermuteItem> items = to_items(tuples);
        std::vector<DType> types;
        for (const int dtype : dtypes) types.push_back(static_cast<DType>(dtype));
        select(permute_add_clones)(items.data(), types.data(), weights.data(),
                                   static_cast<int64_t>(items.size()), threads);
      },
      Released());
}

void bind_tall_mask(py::module_& m) {
  m.def(
      "tall_mask",
      [](Address expert, Address base, Address merged, int dtype, int64_t count, double limit,
         Address mask, int threads) {
        select(tall_mask_clones)(pointer<void>(expert), pointer<void>(base), pointer<void>(merged),
                                 static_cast<DType>(dtype), count, limit, pointer<uint8_t>(mask),
                                 threads);
      },
      Released());
  m.def(
      "tall_mask_apply",
      [](Address mask, Address base, Address merged, int element_bytes, int64_t count, Address out,
         int threads) {
        select(tall_mask_apply_clones)(pointer<uint8_t>(mask), pointer<void>(base),
                                       pointer<void>(merged), element_bytes, count,
                                       pointer<void>(out), threads);
      },
      Released());
  m.def(
      "tall_mask_agreement",
      [](Address masks, int64_t tasks, int64_t bytes, int64_t least, Address kept, Address count,
         int threads) {
        select(tall_mask_agreement_clones)(pointer<uint8_t>(masks), tasks, bytes, least,
                                           pointer<uint8_t>(kept), pointer<int64_t>(count),
                                           threads);
      },
      Released());
}

void bind_dare(py::module_& m) {
  m.def(
      "dare",
      [](Address expert, Address base, Address out, int dtype, int64_t count, uint64_t seed,
         int64_t offset, uint32_t threshold, double scale, int threads) {
        select(dare_clones)(pointer<void>(expert), pointer<void>(base), pointer<void>(out),
                            static_cast<DType>(dtype), count, {seed, offset, threshold, scale},
                            threads);
      },
      Released());
}

void bind_magprune(py::module_& m) {
  m.def(
      "magprune",
      [](Address x, Address out, int dtype, int64_t rows, int64_t length, int64_t segment,
         int64_t offset, uint64_t seed, std::pair<Address, Address> whole,
         std::pair<Address, Address> last, int threads) {
        const auto chances = [](std::pair<Address, Address> of) {
          return RankChances{pointer<uint32_t>(of.first), pointer<double>(of.second)};
        };
        select(magprune_clones)(
            {pointer<void>(x), pointer<void>(out), static_cast<DType>(dtype), rows, length, segment,
             offset, seed, chances(whole), chances(last)},
            threads);
      },
      Released());
}

void bind_inner_products(py::module_& m) {
  m.def(
      "inner_products",
      [](Address base, int base_dtype, const std::vector<PackedTuple>& tensors, int64_t size,
         Address products, int threads) {
        const std::vector<PackedTensor> each = to_packed_tensors(tensors);
        select(inner_products_clones)({pointer<void>(base), static_cast<DType>(base_dtype),
                                       each.data(), static_cast<int>(each.size()), size},
                                      pointer<double>(products), threads);
      },
      Released());
}

void bind_weighted_sum(py::module_& m) {
  m.def(
      "weighted_sum",
      [](Address base, int base_dtype, const std::vector<WeightedTuple>& tensors, double divisor,
         double scale, Address target, int target_dtype, int64_t size, int threads) {
        const std::vector<WeightedTensor> each = to_weighted_tensors(tensors);
        select(weighted_sum_clones)({pointer<void>(base), static_cast<DType>(base_dtype),
                                     each.data(), static_cast<int>(each.size()), divisor, scale,
                                     pointer<void>(target), static_cast<DType>(target_dtype), size},
                                    threads);
      },
      Released());
}

}  // namespace
}  // namespace nlm

PYBIND11_MODULE(_C, m) {
  nlm::choose_isa();
  m.attr("isa") = nlm::kIsaNames[nlm::active_isa];
  m.attr("runnable_isas") =
      std::vector<std::string>(nlm::kIsaNames, nlm::kIsaNames + nlm::best_isa() + 1);
#if defined(_OPENMP) || defined(NLM_STD_THREADS)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("provide_pages", &nlm::provide_pages, nlm::Released());
  m.def("explain_bus_errors", [](std::vector<std::tuple<uintptr_t, size_t, std::string>> files) {
    std::vector<nlm::MappedFile> mapped;
    for (auto& [begin, bytes, name] : files) mapped.push_back({begin, bytes, std::move(name)});
    nlm::explain_bus_errors(std::move(mapped));
  });
  nlm::bind_assignment(m);
  nlm::bind_channel_moments(m);
  nlm::bind_cross_moments(m);
  nlm::bind_magnitude_threshold(m);
  nlm::bind_group_similarity(m);
  nlm::bind_permute(m);
  nlm::bind_scale_shift(m);
  nlm::bind_sign_merge(m);
  nlm::bind_dare(m);
  nlm::bind_magprune(m);
  nlm::bind_tall_mask(m);
  nlm::bind_inner_products(m);
  nlm::bind_weighted_sum(m);
}
