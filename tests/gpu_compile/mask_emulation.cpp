// The bodies of tall_mask and dare over their grids (emulation.h).
#define NLM_ISA emulation

#include "dare_body.h"
#include "emulation.h"
#include "tall_mask_body.h"

using namespace nlm;
using namespace nlm::emulation;

namespace {

struct Memory {
  CheckedAddress expert, base, merged, out, mask, counts;
};

template <class T, int kPack>
int64_t run_build(const Memory& memory, int64_t count, double limit, int64_t first, int64_t end) {
  const MaskGrid work = make_build_grid(count);
  return run(work.grid.blocks(), first, end, [&](int64_t block, int thread) {
    build_body<T, kPack>(work, static_cast<ComputeType<T>>(limit), block, thread, memory);
  });
}

template <class W, int kPack>
int64_t run_apply(const Memory& memory, int64_t count, int64_t first, int64_t end) {
  const MaskGrid work = make_apply_grid(count, kPack);
  return run(work.grid.blocks(), first, end,
             [&](int64_t block, int thread) { apply_body<W, kPack>(work, block, thread, memory); });
}

template <class W>
int64_t apply(const Memory& memory, int64_t count, int64_t first, int64_t end) {
  const bool packed = is_aligned(memory.base.data, 16) && is_aligned(memory.merged.data, 16) &&
                      is_aligned(memory.out.data, 16);
  return packed ? run_apply<W, 16 / sizeof(W)>(memory, count, first, end)
                : run_apply<W, 1>(memory, count, first, end);
}

template <class W>
int64_t run_agreement(const Memory& memory, int64_t tasks, int64_t bytes, int64_t least) {
  const AgreementGrid work = make_agreement_grid(tasks, bytes, least, sizeof(W));
  return run(work.blocks(), 0, -1,
             [&](int64_t block, int thread) { agreement_body<W>(work, block, thread, memory); });
}

}  // namespace

extern "C" {

int64_t emulate_tall_mask(const Memory* memory, int dtype, int64_t count, double limit,
                          int64_t first_block, int64_t end_block) {
  if (count == 0) return 0;
  const bool packed = is_aligned(memory->expert.data, 16) && is_aligned(memory->base.data, 16) &&
                      is_aligned(memory->merged.data, 16);
  return with_device_type(dtype, [&](auto type) {
    using T = decltype(type);
    return packed ? run_build<T, 16 / sizeof(T)>(*memory, count, limit, first_block, end_block)
                  : run_build<T, 1>(*memory, count, limit, first_block, end_block);
  });
}

int64_t emulate_tall_mask_apply(const Memory* memory, int element_bytes, int64_t count,
                                int64_t first_block, int64_t end_block) {
  if (count == 0) return 0;
  switch (element_bytes) {
    case 2:
      return apply<uint16_t>(*memory, count, first_block, end_block);
    case 4:
      return apply<uint32_t>(*memory, count, first_block, end_block);
    case 8:
      return apply<uint64_t>(*memory, count, first_block, end_block);
  }
  return -1;
}

int64_t emulate_tall_mask_walks(int64_t bytes) { return walk_count(bytes); }

int64_t emulate_tall_mask_agreement(const Memory* memory, int64_t tasks, int64_t bytes,
                                    int64_t least) {
  if (bytes == 0) return 0;
  if (bytes % 4 == 0 && is_aligned(memory->mask.data, 4) && is_aligned(memory->out.data, 4)) {
    return run_agreement<uint32_t>(*memory, tasks, bytes, least);
  }
  return run_agreement<uint8_t>(*memory, tasks, bytes, least);
}

int64_t emulate_dare(const Memory* memory, int dtype, int64_t count, const Drop* drop,
                     int64_t first_block, int64_t end_block) {
  if (count == 0) return 0;
  return with_device_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto scale = static_cast<ComputeType<T>>(drop->scale);
    bool packed = false;
    const DropGrid work = make_drop_grid<T>(memory->expert.data, memory->base.data,
                                            memory->out.data, count, *drop, packed);
    return run(work.grid.blocks(), first_block, end_block, [&](int64_t block, int thread) {
      if (packed) {
        drop_body<T, true>(work, scale, block, thread, *memory);
      } else {
        drop_body<T, false>(work, scale, block, thread, *memory);
      }
    });
  });
}

}  // extern "C"
