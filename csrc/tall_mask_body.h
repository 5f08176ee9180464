// The CUDA kernels' work on one (block, thread); tests run the same code over the grid on the CPU.
//
// Building: a thread makes whole bytes, of eight entries each. Applying: a thread moves packs of at
// most eight entries, whose bits lie in one byte. Both in 16 bytes at a time where the addresses
// allow. Counting: a thread walks the words first, first + walks, ... of all masks, adds them bit
// by bit, and leaves the number of the bits that it set.
#pragma once

#include <cstdint>

#include "core/device.h"
#include "core/view.h"
#include "tall_mask.h"

namespace nlm::NLM_ISA {

inline constexpr int kCountPlanes = 8;  // bits of a count of masks

// One row of columns: bytes of a mask, or packs of entries.
struct MaskGrid {
  RowGrid grid;
  int64_t count;  // entries
};

inline MaskGrid make_build_grid(int64_t count) {
  return {RowGrid::make(1, (count + 7) / 8), count};
}
inline MaskGrid make_apply_grid(int64_t count, int pack) {
  return {RowGrid::make(1, (count + pack - 1) / pack), count};
}

template <class T, class S>
NLM_DEVICE uint32_t lives(T expert, T base, T merged, S limit) {
  const S moved = widen(expert) - widen(base);
  const S missed = widen(expert) - widen(merged);
  return (moved < 0 ? -moved : moved) > limit * (missed < 0 ? -missed : missed);
}

template <class T, int kPack, class Memory>
NLM_DEVICE void build_body(const MaskGrid& work, ComputeType<T> limit, int64_t block, int thread,
                           const Memory& memory) {
  if (work.grid.row(block, thread) > 0) return;
  const auto expert = memory.expert.template as<const Pack<T, kPack>>();
  const auto base = memory.base.template as<const Pack<T, kPack>>();
  const auto merged = memory.merged.template as<const Pack<T, kPack>>();
  const int64_t end = work.grid.end_column(block);
  for (int64_t byte = work.grid.first_column(block, thread); byte < end; byte += work.grid.lanes) {
    uint32_t bits = 0;
    if (8 * byte + 8 <= work.count) {
      constexpr int kPacks = 8 / kPack;
      Pack<T, kPack> e[kPacks], b[kPacks], m[kPacks];
      for (int p = 0; p < kPacks; ++p) {
        e[p] = expert[byte * kPacks + p];
        b[p] = base[byte * kPacks + p];
        m[p] = merged[byte * kPacks + p];
      }
      for (int i = 0; i < 8; ++i) {
        const int p = i / kPack, k = i % kPack;
        bits |= lives(e[p].value[k], b[p].value[k], m[p].value[k], limit) << i;
      }
    } else {
      for (int64_t i = 8 * byte; i < work.count; ++i) {
        bits |=
            lives(memory.expert.template as<const T>()[i], memory.base.template as<const T>()[i],
                  memory.merged.template as<const T>()[i], limit)
            << (i - 8 * byte);
      }
    }
    memory.mask.template as<uint8_t>()[byte] = static_cast<uint8_t>(bits);
  }
}

template <class W, int kPack, class Memory>
NLM_DEVICE void apply_body(const MaskGrid& work, int64_t block, int thread, const Memory& memory) {
  if (work.grid.row(block, thread) > 0) return;
  const auto mask = memory.mask.template as<const uint8_t>();
  const int64_t end = work.grid.end_column(block);
  for (int64_t column = work.grid.first_column(block, thread); column < end;
       column += work.grid.lanes) {
    const int64_t first = column * kPack;
    const uint32_t bits = mask[first / 8] >> first % 8;
    if (first + kPack <= work.count) {
      Pack<W, kPack> result = memory.base.template as<const Pack<W, kPack>>()[column];
      const Pack<W, kPack> merged = memory.merged.template as<const Pack<W, kPack>>()[column];
      for (int k = 0; k < kPack; ++k) {
        if (bits >> k & 1) result.value[k] = merged.value[k];
      }
      memory.out.template as<Pack<W, kPack>>()[column] = result;
    } else {
      for (int64_t i = first; i < work.count; ++i) {
        memory.out.template as<W>()[i] = bits >> (i - first) & 1
                                             ? memory.merged.template as<const W>()[i]
                                             : memory.base.template as<const W>()[i];
      }
    }
  }
}

NLM_DEVICE int bits_set(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

struct AgreementGrid {
  int64_t tasks, words, least;  // words of each mask
  int64_t walks;
  int64_t blocks() const { return (walks + kBlockThreads - 1) / kBlockThreads; }
};

// Threads that count: enough to fill a GPU, few enough that their results are small.
inline int64_t walk_count(int64_t bytes) {
  constexpr int64_t kMost = 1 << 17;
  const int64_t words = (bytes + 3) / 4;
  return words < kMost ? words : kMost;
}

inline AgreementGrid make_agreement_grid(int64_t tasks, int64_t bytes, int64_t least,
                                         int word_bytes) {
  return {tasks, bytes / word_bytes, least, walk_count(bytes)};
}

// Plane p holds bit p of the counts of a word's entries; a mask is added as to a binary counter.
template <class W, class Memory>
NLM_DEVICE void agreement_body(const AgreementGrid& work, int64_t block, int thread,
                               const Memory& memory) {
  const int64_t walk = block * kBlockThreads + thread;
  if (walk >= work.walks) return;
  const auto masks = memory.mask.template as<const W>();
  int64_t count = 0;
  for (int64_t i = walk; i < work.words; i += work.walks) {
    W planes[kCountPlanes] = {};
    for (int64_t t = 0; t < work.tasks; ++t) {
      W carry = masks[t * work.words + i];
      for (int p = 0; p < kCountPlanes; ++p) {
        const W next = planes[p] & carry;
        planes[p] ^= carry;
        carry = next;
      }
    }
    W more = 0;
    W equal = static_cast<W>(~W{0});
    for (int p = kCountPlanes - 1; p >= 0; --p) {
      if (work.least >> p & 1) {
        equal &= planes[p];
      } else {
        more |= equal & planes[p];
        equal &= static_cast<W>(~planes[p]);
      }
    }
    const W kept = static_cast<W>(work.least >> kCountPlanes ? 0 : more | equal);
    memory.out.template as<W>()[i] = kept;
    count += bits_set(kept);
  }
  memory.counts.template as<int64_t>()[walk] = count;
}

}  // namespace nlm::NLM_ISA
