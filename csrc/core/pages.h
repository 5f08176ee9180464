// Memory that is about to be written for the first time.
//
// The system hands out zeroed pages on the first touch. Copying 400 MB into such memory with two
// threads took 200 ms in pages of 4 KiB, and 110 in pages of 2 MiB that each thread touched as it
// came to them: threads that meet in a page both zero it. With the pages provided beforehand, each
// by one thread, it took 75, of which zeroing is 40; into memory that was there before, 35.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nlm {

// Provides the pages of blocks [address, address + bytes), large ones where the system has them,
// on all threads. Changes no content; where the system cannot, pages come on the first touch.
inline void provide_pages(std::vector<std::pair<uintptr_t, int64_t>> blocks, int threads) {
#if defined(MADV_HUGEPAGE) && defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kLarge = 2 << 20, kSmall = 4 << 10;
  struct Piece {
    uintptr_t begin, end;
  };
  std::vector<Piece> pieces;  // what the blocks need of each large page
  std::sort(blocks.begin(), blocks.end());
  for (const auto& [address, bytes] : blocks) {
    const uintptr_t end = (address + static_cast<uintptr_t>(bytes) + kSmall - 1) / kSmall * kSmall;
    uintptr_t begin = address / kSmall * kSmall;
    // Whole large pages, those that begin or end with a neighbour included: a hint, which is
    // ignored where that is not so.
    const uintptr_t first = begin / kLarge * kLarge;
    madvise(reinterpret_cast<void*>(first), (end + kLarge - 1) / kLarge * kLarge - first,
            MADV_HUGEPAGE);
    while (begin < end) {
      const uintptr_t next = std::min(end, (begin / kLarge + 1) * kLarge);
      if (!pieces.empty() && pieces.back().begin / kLarge == begin / kLarge) {
        pieces.back().end = next;
      } else {
        pieces.push_back({begin, next});
      }
      begin = next;
    }
  }
  const auto count = static_cast<int64_t>(pieces.size());
  (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
#endif
  for (int64_t i = 0; i < count; ++i) {
    const uintptr_t bytes = pieces[i].end - pieces[i].begin;
    const uintptr_t middle = pieces[i].begin + bytes / 2 / kSmall * kSmall;
    unsigned char present = 0;  // memory that was freed and is used again
    if (mincore(reinterpret_cast<void*>(middle), kSmall, &present) == 0 && present % 2 != 0)
      continue;
    madvise(reinterpret_cast<void*>(pieces[i].begin), bytes, MADV_POPULATE_WRITE);
  }
#else
  (void)blocks;
  (void)threads;
#endif
}

}  // namespace nlm
