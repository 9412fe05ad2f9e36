// The loss, its gradient and the normalised tangent: the numbers of each sample by presets.h, a
// thread a sample, and the passes over its elements by the other kernels of the tangent.

#include "presets.h"
#include "tangent_plan.cuh"

namespace scm {
namespace cuda {
namespace {

constexpr int kSamples = 128;  // of a block

struct CoefficientsParams {
  Options options;
  int64_t b;
  double* to;  // [b, 4]
};

__device__ int64_t own_sample() { return int64_t{blockIdx.x} * kSamples + threadIdx.x; }

extern "C" __global__ void __launch_bounds__(kSamples)
    tangent_coefficients_kernel(const __grid_constant__ CoefficientsParams p) {
  const int64_t i = own_sample();
  if (i < p.b) sample::coefficients(p.options, i, p.to);
}

extern "C" __global__ void __launch_bounds__(kSamples)
    tangent_loss_kernel(const __grid_constant__ TangentLoss p) {
  const int64_t i = own_sample();
  if (i < p.b) sample::loss(p, i);
}

extern "C" __global__ void __launch_bounds__(kSamples)
    tangent_gradient_kernel(const __grid_constant__ TangentGradient p) {
  const int64_t i = own_sample();
  if (i < p.b) sample::gradient(p, i);
}

// A kernel with a thread for each of b samples.
template <class Params>
cudaError_t launch(Queue& queue, void (*kernel)(Params), const char* name, int64_t b,
                   const Params& params) {
  return queue.launch(kernel, name, up(b, kSamples), kSamples, 0, params);
}

cudaError_t launch_coefficients(const Tangent& p, const Options& options, Queue& queue) {
  return launch(queue, tangent_coefficients_kernel, "tangent_coefficients_kernel", p.b,
                CoefficientsParams{options, p.b, p.coefficients});
}

}  // namespace

cudaError_t launch_tangent_loss(const TangentLoss& p, Queue& queue) {
  cudaError_t error = launch_coefficients(p, p.options, queue);
  if (error == cudaSuccess) error = launch_tangent_norm({p, p.distances}, queue);
  if (error != cudaSuccess) return error;
  return launch(queue, tangent_loss_kernel, "tangent_loss_kernel", p.b, p);
}

cudaError_t launch_tangent_gradient(const TangentGradient& p, Queue& queue) {
  const cudaError_t error =
      launch(queue, tangent_gradient_kernel, "tangent_gradient_kernel", p.b, p);
  TangentApply scaled = p;
  scaled.coefficients = p.scaled;
  return error == cudaSuccess ? launch_tangent_apply(scaled, queue) : error;
}

cudaError_t launch_tangent_normalize(const TangentNormalize& p, Queue& queue) {
  const cudaError_t error = launch_coefficients(p, p.options, queue);
  return error == cudaSuccess ? launch_tangent_scaled(p, queue) : error;
}

}  // namespace cuda
}  // namespace scm
