#include "queue.h"

#include <limits>

namespace scm {
namespace cuda {

cudaError_t Queue::run(const void* kernel, const char* name, int64_t blocks, int threads,
                       int shared, const void* params, size_t size) {
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (list_ != nullptr) {
    list_->push_back({name, blocks, threads, shared, {static_cast<const char*>(params), size}});
    return cudaSuccess;
  }
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device_) error = cudaSetDevice(device_);
  if (error != cudaSuccess) return error;
  if (shared > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<void*>(params)};
    error = cudaLaunchKernel(kernel, static_cast<unsigned>(blocks), threads, arguments, shared,
                             stream_);
  }
  if (before != device_) cudaSetDevice(before);
  return error;
}

}  // namespace cuda
}  // namespace scm
