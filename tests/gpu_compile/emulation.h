// Runs the bodies of the CUDA kernels on the CPU: every block and thread of the grid, one after
// another, over memory that counts each access outside of its range or off its alignment.
//
// A function returns that count. Blocks [first_block, end_block) are run; a negative first_block
// counts from the end, and end_block < 0 is the end.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/device.h"
#include "core/view.h"

namespace {

int64_t violations;

struct Range {
  uintptr_t begin, end;
};

template <class T>
struct Checked {
  uintptr_t data;
  Range range;

  T& operator[](int64_t i) const {
    static std::remove_const_t<T> nowhere;
    const uintptr_t address = data + static_cast<uintptr_t>(i) * sizeof(T);
    if (address >= range.begin && address + sizeof(T) <= range.end && address % alignof(T) == 0) {
      return *reinterpret_cast<T*>(address);
    }
    ++violations;
    nowhere = {};
    return nowhere;
  }
};

template <class T>
Checked<T> checked(const void* data, const Range& range) {
  return {reinterpret_cast<uintptr_t>(data), range};
}

// The counterpart of DeviceAddress.
struct CheckedAddress {
  const void* data;
  Range range;

  template <class T>
  Checked<T> as() const {
    return checked<T>(data, range);
  }
};

// body(T{}) with the GPU's type of elements.
template <class Body>
int64_t with_device_type(int dtype, const Body& body) {
  switch (static_cast<nlm::DType>(dtype)) {
    case nlm::DType::kFloat16:
      return body(nlm::DeviceFloat16{});
    case nlm::DType::kBFloat16:
      return body(nlm::DeviceBFloat16{});
    case nlm::DType::kFloat32:
      return body(float{});
    case nlm::DType::kFloat64:
      return body(double{});
  }
  return -1;
}

// The phases of a body lie between barriers: all threads of a block run one, then the next.
template <class... Phase>
int64_t run(int64_t blocks, int64_t first_block, int64_t end_block, const Phase&... phases) {
  violations = 0;
  if (first_block < 0) first_block += blocks;
  if (end_block < 0) end_block = blocks;
  for (int64_t block = first_block; block < end_block; ++block) {
    const auto all_threads = [block](const auto& phase) {
      for (int thread = 0; thread < nlm::kBlockThreads; ++thread) phase(block, thread);
    };
    (all_threads(phases), ...);
  }
  return violations;
}

}  // namespace
