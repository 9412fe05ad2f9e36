#include "queue.h"

#include <limits>
#include <map>
#include <mutex>
#include <utility>

namespace scm {
namespace cuda {

namespace {

// A kernel may take more than 48 KiB of shared memory where so much has been asked for, on a
// device: not at every launch, as it takes longer than that.
cudaError_t allow_shared(const void* kernel, int device, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
}

}  // namespace

int Queue::hopper_processors() const {
  if (list_ != nullptr) return 0;
  int major = 0, processors = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_);
  return major == 9 ? processors : 0;
}

cudaError_t Queue::run(const void* kernel, const char* name, int64_t blocks, int threads,
                       int shared, const void* params, size_t size) {
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (list_ != nullptr) {
    list_->push_back({name, blocks, threads, shared, {static_cast<const char*>(params), size}});
    return cudaSuccess;
  }
  // The caller has made this device PyTorch's; here it becomes that of the runtime linked to this
  // module, on this thread, which has a notion of its own.
  cudaError_t error = cudaSetDevice(device_);
  if (error == cudaSuccess && shared > 48 * 1024) error = allow_shared(kernel, device_, shared);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<void*>(params)};
  return cudaLaunchKernel(kernel, static_cast<unsigned>(blocks), threads, arguments, shared,
                          stream_);
}

}  // namespace cuda
}  // namespace scm
