// One source, several instruction sets.
//
// A kernel file csrc/<stem>.cpp is compiled once per entry of the list below, with
// -DNLM_ISA=<entry> and that entry's -march flag, and puts everything it defines into `namespace
// nlm::NLM_ISA`. Its header csrc/<stem>.h declares the entry point for all of them:
//
//     namespace nlm {
//     NLM_KERNEL(void, scale_shift, (const View3& x, ..., int threads));
//     }
//
// and bind.cpp calls the clone of the machine: `nlm::select(nlm::scale_shift_clones)(x, ...,
// threads)`.
//
// Why the namespace matters: two clones of one inline function have one name, and the linker keeps
// any of them, an AVX-512 one on an old machine too. So the headers that hold inline code
// (parallel.h, simd.h, bf16.h) are in nlm::NLM_ISA as well, and a kernel file uses no out-of-line
// template of the standard library (std::vector, std::sort, ...). isa.h and view.h are shared by
// all and hold declarations, plain data and always-inlined accessors only.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define NLM_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && !defined(NLM_PLAIN)
// Must agree with setup.py. v2 is SSE4.2, v3 is AVX2 + FMA + F16C, v4 is AVX-512 F/BW/CD/DQ/VL, amx
// is v4 with bfloat16 matrix tiles: for kernels that NLM_KERNEL_AMX declares, v4 for all others.
#define NLM_ISA_NAMES {"v2", "v3", "v4", "amx"}
#define NLM_DECLARE(result, name, arguments) \
  namespace v2 {                             \
  result name arguments;                     \
  }                                          \
  namespace v3 {                             \
  result name arguments;                     \
  }                                          \
  namespace v4 {                             \
  result name arguments;                     \
  }
#define NLM_KERNEL(result, name, arguments)                                                \
  NLM_DECLARE(result, name, arguments)                                                     \
  inline constexpr decltype(&v2::name) name##_clones[] = {&v2::name, &v3::name, &v4::name, \
                                                          &v4::name}
#define NLM_KERNEL_AMX(result, name, arguments)                                            \
  NLM_DECLARE(result, name, arguments)                                                     \
  namespace amx {                                                                          \
  result name arguments;                                                                   \
  }                                                                                        \
  inline constexpr decltype(&v2::name) name##_clones[] = {&v2::name, &v3::name, &v4::name, \
                                                          &amx::name}
#else
#define NLM_ISA_NAMES {"plain"}
#define NLM_KERNEL(result, name, arguments) \
  namespace plain {                         \
  result name arguments;                    \
  }                                         \
  inline constexpr decltype(&plain::name) name##_clones[] = {&plain::name}
#define NLM_KERNEL_AMX NLM_KERNEL
#endif

namespace nlm {

inline constexpr const char* kIsaNames[] = NLM_ISA_NAMES;
inline constexpr int kIsaCount = sizeof(kIsaNames) / sizeof(kIsaNames[0]);

// Position in kIsaNames of the instruction set in use. Set once when the module is imported, before
// any kernel can run.
extern int active_isa;

template <class Function>
Function select(const Function (&clones)[kIsaCount]) {
  return clones[active_isa];
}

#if defined(__x86_64__) && !defined(NLM_PLAIN)
// Whether the processor has AMX for bfloat16, and Linux lets this process use it: it hands out the
// tiles' 8 KB of state only to those who ask.
inline bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_tiles = (d >> 22 & 1) != 0 && (d >> 24 & 1) != 0;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Position in kIsaNames of the best instruction set that this machine runs; -1 when there is none.
inline int best_isa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return -1;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2")) {
    return 0;
  }
  const bool has_v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!has_v4) return 1;
  return has_amx() ? 3 : 2;
}
#else
inline int best_isa() { return 0; }
#endif

}  // namespace nlm
