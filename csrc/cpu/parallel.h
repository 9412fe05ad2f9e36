// Threads: OpenMP, whose pool is then the one that torch's own ops use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace scm {

// Calls body(context, item, scratch) for every item below `items`, each once, on up to `threads`
// threads; a thread has `scratch_bytes` of its own, aligned to 64, not cleared. kOutOfMemory: some
// items were not run.
Status parallel_for(int64_t items, int threads, size_t scratch_bytes,
                    void (*body)(const void* context, int64_t item, char* scratch),
                    const void* context);

// The same for a function object body(item, scratch).
template <class Body>
static inline Status parallel_for(int64_t items, int threads, size_t scratch_bytes,
                                  const Body& body) {
  return parallel_for(
      items, threads, scratch_bytes,
      [](const void* context, int64_t item, char* scratch) {
        (*static_cast<const Body*>(context))(item, scratch);
      },
      &body);
}

}  // namespace scm
