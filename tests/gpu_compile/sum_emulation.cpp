// The body of weighted_sum over its grid (emulation.h).
#define NLM_ISA emulation

#include "emulation.h"
#include "weighted_sum_body.h"

using namespace nlm;
using namespace nlm::emulation;

namespace {

struct SumMemory {
  const SumGrid& work;
  const Range* ranges;  // of the base, the target and the tensors

  template <class T>
  Checked<const T> base() const {
    return checked<const T>(work.base, ranges[0]);
  }
  template <class T>
  Checked<const T> tensor(int k) const {
    return checked<const T>(work.tensors[k], ranges[2 + k]);
  }
  template <class T>
  Checked<T> target() const {
    return checked<T>(work.target, ranges[1]);
  }
};

}  // namespace

extern "C" {

int64_t emulate_weighted_sum(const WeightedSum* sum, const Range* ranges, int64_t first_block,
                             int64_t end_block) {
  if (sum->size == 0) return 0;
  return with_device_type(static_cast<int>(sum->target_dtype), [&](auto type) {
    using T = decltype(type);
    bool packed = false;
    const SumGrid work = make_sum_grid<T>(*sum, packed);
    const SumMemory memory = {work, ranges};
    return run(work.grid.blocks(), first_block, end_block, [&](int64_t block, int thread) {
      if (packed) {
        sum_body<T, true>(work, block, thread, memory);
      } else {
        sum_body<T, false>(work, block, thread, memory);
      }
    });
  });
}

}  // extern "C"
