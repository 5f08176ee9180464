// The Python module nlm._C. No other C++ file knows Python.
//
// Every function takes addresses, sizes and strides as integers that nlm/_native.py makes from
// tensors which nlm/ops has checked, and releases the GIL for the whole call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "channel_moments.h"
#include "core/isa.h"
#include "core/view.h"

namespace py = pybind11;

namespace nlm {

int active_isa = -1;

namespace {

using Released = py::call_guard<py::gil_scoped_release>;
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

using ViewTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using MaskTuple = std::tuple<Address, int64_t, int64_t>;

View3 to_view(const ViewTuple& t) {
  return {pointer<void>(std::get<0>(t)),
          static_cast<DType>(std::get<1>(t)),
          std::get<2>(t),
          std::get<3>(t),
          std::get<4>(t),
          std::get<5>(t),
          std::get<6>(t),
          std::get<7>(t)};
}

Mask2 to_mask(const MaskTuple& t) {
  return {pointer<const uint8_t>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

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

}  // namespace
}  // namespace nlm

PYBIND11_MODULE(_C, m) {
  nlm::choose_isa();
  m.attr("isa") = nlm::kIsaNames[nlm::active_isa];
  m.attr("runnable_isas") =
      std::vector<std::string>(nlm::kIsaNames, nlm::kIsaNames + nlm::best_isa() + 1);
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  nlm::bind_channel_moments(m);
}
