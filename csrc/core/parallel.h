// Threads and scratch memory.
//
// The rule that gives the same bits for any number of threads: the work is cut into tasks by its
// shape alone, a task writes only what belongs to it, and partial results are combined in the order
// of the tasks. Which thread runs a task is then of no consequence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(_OPENMP) && !defined(NLM_STD_THREADS)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "isa.h"

#if defined(NLM_STD_THREADS)
namespace nlm {
// body(context, thread) on `threads` threads of the standard library, this one among them; returns
// when all are done. For ThreadSanitizer, to which libgomp's locks are unknown (NLM_SANITIZE=thread
// in setup.py); in bind.cpp, once for all instruction sets.
void run_team(int threads, void (*body)(void*, int), void* context);
}  // namespace nlm
#endif

namespace nlm::NLM_ISA {

NLM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// body(task, thread) for every task in [0, tasks), 0 <= thread < threads. The body must not throw.
template <class Body>
inline void parallel_for(int64_t tasks, int threads, const Body& body) {
#if defined(NLM_STD_THREADS)
  if (threads > 1 && tasks > 1) {
    struct Work {
      const Body& body;
      int64_t tasks, next;
    } work{body, tasks, 0};
    const auto run = [](void* context, int thread) {
      Work& shared = *static_cast<Work*>(context);
      for (;;) {
        const int64_t task = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED);
        if (task >= shared.tasks) return;
        shared.body(task, thread);
      }
    };
    run_team(static_cast<int>(smaller(threads, tasks)), run, &work);
    return;
  }
#elif defined(_OPENMP)
  if (threads > 1 && tasks > 1) {
    const int team = static_cast<int>(smaller(threads, tasks));
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

// Entries of a task where each is worked on by itself: a multiple of 2^15, and many for many.
NLM_INLINE int64_t entries_per_task(int64_t count) {
  return larger(1, smaller(count >> 22, 16)) << 15;
}

// Uninitialised memory on a cache-line boundary. Allocated before a parallel region, never inside.
// Much of it is on huge pages where there are any: faults and missed translations of 4 KB pages
// cost as much as the packing of a matrix.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr std::size_t kHuge = 2 << 20;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    const std::size_t line = bytes < kHuge ? 64 : kHuge;
    const std::size_t rounded = (bytes + line) / line * line;
    data_ = static_cast<T*>(std::aligned_alloc(line, rounded));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (line == kHuge) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace nlm::NLM_ISA
