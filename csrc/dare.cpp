// out = base + keep * scale * (expert - base), keep drawn by Philox4x32-10 (Salmon et al., Parallel
// Random Numbers: As Easy as 1, 2, 3, 2011).
//
// A counter-based generator: the random number of an entry depends on the seed and its position
// alone, so that the work is cut at will. A block of entries has its random words drawn into the
// first-level cache (core/philox.h) and used from there, which leaves the offset free to be no
// multiple of four.
#include "dare.h"

#include "core/parallel.h"
#include "core/philox.h"
#include "core/simd.h"
#include "core/stream.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kBlockEntries = 1024;

// All bits of the lanes whose word is not below the threshold.
template <class T>
NLM_INLINE auto kept_lanes(const uint32_t* words, uint32_t threshold) {
  if constexpr (std::is_same_v<T, double>) {
    typedef uint32_t half __attribute__((vector_size(kVectorBytes / 2)));
    return (vint64)(__builtin_convertvector(load_vector<half>(words), vint64) >=
                    (vint64{} + static_cast<int64_t>(threshold)));
  } else {
    return (vint32)(load_vector<vuint32>(words) >= (vuint32{} + threshold));
  }
}

template <class T>
NLM_INLINE typename Lanes<T>::vector rescaled(typename Lanes<T>::vector expert,
                                              typename Lanes<T>::vector base, const uint32_t* words,
                                              uint32_t threshold, typename Lanes<T>::scalar scale) {
  const auto kept = kept_lanes<T>(words, threshold);
  using bits = decltype(kept + kept);
  const auto moved = base + scale * (expert - base);
  return (typename Lanes<T>::vector)((kept & (bits)moved) | (~kept & (bits)base));
}

template <class T>
void drop_entries(const T* expert, const T* base, T* out, int64_t count, const Drop& drop,
                  int threads) {
  constexpr int kLanes = Lanes<T>::count;
  const auto scale = static_cast<typename Lanes<T>::scalar>(drop.scale);
  const int64_t lead = drop.offset % 4;
  const int64_t task_entries = entries_per_task(count);
  const bool streamed = streams(out, count * static_cast<int64_t>(sizeof(T)), kLanes);
  parallel_for(ceil_div(count, task_entries), threads, [&](int64_t task, int) {
    alignas(64) uint32_t drawn[kBlockEntries + 2 * kDrawn];
    const uint32_t* words = drawn + lead;
    const int64_t end = smaller((task + 1) * task_entries, count);
    for (int64_t first = task * task_entries; first < end; first += kBlockEntries) {
      const int64_t entries = smaller(kBlockEntries, end - first);
      draw(drop.seed, drop.offset / 4 + first / 4, lead + entries, drawn);
      const T *e = expert + first, *b = base + first;
      T* o = out + first;
      int64_t i = 0;
      for (; i + kLanes <= entries; i += kLanes) {
        store(o + i, rescaled<T>(load(e + i), load(b + i), words + i, drop.threshold, scale),
              streamed);
      }
      if (i < entries) {
        const int64_t left = entries - i;
        store_first(o + i,
                    rescaled<T>(load_first(e + i, left), load_first(b + i, left), words + i,
                                drop.threshold, scale),
                    left);
      }
    }
    end_stream(streamed);
  });
}

}  // namespace

void dare(const void* expert, const void* base, void* out, DType dtype, int64_t count,
          const Drop& drop, int threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    drop_entries(static_cast<const T*>(expert), static_cast<const T*>(base), static_cast<T*>(out),
                 count, drop, threads);
  });
}

}  // namespace nlm::NLM_ISA
