#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

// SCM_ISAS(X) is X(name) for each instruction set that the build compiled, best first.
#define SCM_DECLARE(isa)        \
  namespace isa {               \
  extern const Kernels kernels; \
  }

namespace scm {

SCM_ISAS(SCM_DECLARE)

namespace {

bool processor_has(const char* isa) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(isa, "avx512_bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  if (std::strcmp(isa, "avx2") == 0) {
    unsigned a, b, c, d;  // compilers differ in whether they know of float16
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  }
#endif
  return std::strcmp(isa, "baseline") == 0;
}

// Whether AVX-512 in float32 is faster for bfloat16, too: on Intel's processors, which issue
// products of pairs at 0.55 to 0.67 of the rate of those in float32, and pairs have to be made
// first. Attention is 1.1 to 1.9 times as fast without them (measured on an Emerald Rapids).
bool prefers_float32() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

std::atomic<size_t> selected{0};

}  // namespace

const std::vector<Kernels>& available_kernels() {
#define SCM_ENTRY(isa) isa::kernels,
  static const std::vector<Kernels> available = [] {
    const Kernels built[] = {SCM_ISAS(SCM_ENTRY)};
    std::vector<Kernels> list;
    for (const Kernels& kernels : built) {
      if (processor_has(kernels.isa)) list.push_back(kernels);
    }
    if (list.size() > 1 && std::strcmp(list[1].isa, "avx512") == 0 && prefers_float32()) {
      std::swap(list[0], list[1]);  // avx512_bf16 is the one before it
    }
    return list;
  }();
  return available;
}

const Kernels& kernels() { return available_kernels()[selected]; }

bool select_kernels(const char* isa) {
  const std::vector<Kernels>& all = available_kernels();
  for (size_t i = 0; i < all.size(); ++i) {
    if (std::strcmp(all[i].isa, isa) == 0) {
      selected = i;
      return true;
    }
  }
  return false;
}

Status attention_forward(const AttentionForward& p) { return kernels().attention_forward(p); }

Status attention_backward(const AttentionBackward& p) { return kernels().attention_backward(p); }

}  // namespace scm
