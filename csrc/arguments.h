// The arguments that nlm/_native.py and nlm/ops make of tensors, as the kernels' types. Shared by
// the bindings; knows no Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "core/view.h"
#include "magnitude_threshold.h"
#include "permute.h"
#include "sign_merge.h"

namespace nlm {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

using ViewTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using MaskTuple = std::tuple<Address, int64_t, int64_t>;

inline View3 to_view(const ViewTuple& t) {
  return {pointer<void>(std::get<0>(t)),
          static_cast<DType>(std::get<1>(t)),
          std::get<2>(t),
          std::get<3>(t),
          std::get<4>(t),
          std::get<5>(t),
          std::get<6>(t),
          std::get<7>(t)};
}

inline Mask2 to_mask(const MaskTuple& t) {
  return {pointer<const uint8_t>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

// (source, target, per axis (size, stride, index, parents)).
using PermuteAxisTuple = std::tuple<int64_t, int64_t, Address, std::vector<int>>;
using PermuteTuple = std::tuple<Address, Address, std::vector<PermuteAxisTuple>>;

inline std::vector<PermuteItem> to_items(const std::vector<PermuteTuple>& tuples) {
  std::vector<PermuteItem> items(tuples.size());
  for (size_t t = 0; t < tuples.size(); ++t) {
    const auto& [source, target, axes] = tuples[t];
    PermuteItem& item = items[t];
    item.source = pointer<const void>(source);
    item.target = pointer<void>(target);
    item.axis_count = static_cast<int>(axes.size());
    for (size_t a = 0; a < axes.size(); ++a) {
      const auto& [size, stride, index, parents] = axes[a];
      PermuteAxis& axis = item.axes[a];
      axis.size = size;
      axis.stride = stride;
      axis.index = pointer<const int64_t>(index);
      axis.parent_count = static_cast<int>(parents.size());
      std::copy(parents.begin(), parents.end(), axis.parents);
    }
  }
  return items;
}

// (values, their type, base or 0, its type, size).
using MagnitudeTuple = std::tuple<Address, int, Address, int, int64_t>;

inline std::vector<MagnitudeItem> to_magnitude_items(const std::vector<MagnitudeTuple>& tuples) {
  std::vector<MagnitudeItem> items;
  for (const auto& [values, dtype, base, base_dtype, size] : tuples) {
    items.push_back({pointer<const void>(values), pointer<const void>(base),
                     static_cast<DType>(dtype), static_cast<DType>(base_dtype), size});
  }
  return items;
}

// (address, type).
using PackedTuple = std::tuple<Address, int>;

inline std::vector<PackedTensor> to_packed_tensors(const std::vector<PackedTuple>& tuples) {
  std::vector<PackedTensor> tensors;
  for (const auto& [data, dtype] : tuples) {
    tensors.push_back({pointer<const void>(data), static_cast<DType>(dtype)});
  }
  return tensors;
}

// (address, type, weight).
using WeightedTuple = std::tuple<Address, int, double>;

inline std::vector<WeightedTensor> to_weighted_tensors(const std::vector<WeightedTuple>& tuples) {
  std::vector<WeightedTensor> tensors;
  for (const auto& [data, dtype, weight] : tuples) {
    tensors.push_back({pointer<const void>(data), static_cast<DType>(dtype), weight});
  }
  return tensors;
}

// (base, target, type, size, thresholds, scale, dialect, contested, again).
using SignMergeTuple =
    std::tuple<Address, Address, int, int64_t, Address, double, int, Address, bool>;

// The experts outlive the item.
inline SignMergeItem to_sign_merge_item(const SignMergeTuple& tuple,
                                        const std::vector<WeightedTensor>& experts) {
  const auto& [base, target, dtype, size, thresholds, scale, dialect, contested, again] = tuple;
  return {pointer<const void>(base),
          pointer<void>(target),
          static_cast<DType>(dtype),
          size,
          experts.data(),
          static_cast<int>(experts.size()),
          pointer<const void>(thresholds),
          scale,
          static_cast<SignDialect>(dialect),
          pointer<uint8_t>(contested),
          again};
}

}  // namespace nlm
