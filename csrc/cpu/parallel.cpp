#include "parallel.h"

#include <atomic>
#include <cstdlib>
#ifndef _OPENMP
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace scm {
namespace {

struct Job {
  int64_t items;
  size_t scratch_bytes;
  void (*body)(const void*, int64_t, char*);
  const void* context;
  std::atomic<int64_t> next{0};

  // Takes items until none is left: uneven ones (causal tiles) balance. A thread that gets no
  // scratch memory leaves them to the others.
  void work() {
    const size_t bytes = (scratch_bytes + 63) / 64 * 64;
    char* scratch = bytes == 0 ? nullptr : static_cast<char*>(std::aligned_alloc(64, bytes));
    if (bytes != 0 && scratch == nullptr) return;
    for (int64_t item; (item = next.fetch_add(1)) < items;) body(context, item, scratch);
    std::free(scratch);
  }
};

}  // namespace

Status parallel_for(int64_t items, int threads, size_t scratch_bytes,
                    void (*body)(const void*, int64_t, char*), const void* context) {
  Job job{items, scratch_bytes, body, context};
  if (threads > items) threads = static_cast<int>(items);
  if (threads <= 1) {
    job.work();
  } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    job.work();
#else
    std::vector<std::thread> pool;
    pool.reserve(threads);
    try {
      for (int i = 1; i < threads; ++i) pool.emplace_back([&job] { job.work(); });
    } catch (const std::system_error&) {  // fewer threads then
    }
    job.work();
    for (std::thread& thread : pool) thread.join();
#endif
  }
  return job.next < items ? kOutOfMemory : kOk;
}

}  // namespace scm
