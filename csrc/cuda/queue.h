// Where launches go: to a stream of a GPU, or into a list, so that a test can run them elsewhere.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

namespace scm {
namespace cuda {

// A kernel, `blocks` blocks of it, and its one parameter, a plain struct.
struct Launch {
  std::string name;  // as in the machine code
  int64_t blocks;
  int threads, shared;  // of a block; bytes of dynamic shared memory
  std::string params;   // the struct's bytes
};

class Queue {
 public:
  // Launches are made on this stream of this device. Nothing waits for them.
  Queue(int device, cudaStream_t stream) : device_(device), stream_(stream) {}
  // Launches are written down.
  explicit Queue(std::vector<Launch>* list) : list_(list) {}

  // The multiprocessors of a Hopper GPU; 0 on others, and where launches are written down.
  int hopper_processors() const;

  template <class Params>
  cudaError_t launch(void (*kernel)(Params), const char* name, int64_t blocks, int threads,
                     int shared, const Params& params) {
    return run(reinterpret_cast<const void*>(kernel), name, blocks, threads, shared, &params,
               sizeof(Params));
  }

 private:
  cudaError_t run(const void* kernel, const char* name, int64_t blocks, int threads, int shared,
                  const void* params, size_t size);

  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  std::vector<Launch>* list_ = nullptr;
};

}  // namespace cuda
}  // namespace scm
