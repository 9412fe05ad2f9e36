// The sum of the squares of each sample's g = a F + b V + k X + d J: the formulas of
// scm_kernels/tangent/reference.py, whose loss is a number made of it. g is combined in float32,
// its squares are summed in float64.
//
// A thread takes every lanes-th vector of 16 bytes of its sample. Large samples are in parts, whose
// sums a second kernel adds up.
//
// The versions, by the bytes that a full multiprocessor has on their way to it (sm_80, from
// ptxas's registers; modelled):
//
//   a vector of each input at a time          40 registers     96 KiB
//   two, asked for before the first is used   56 registers   128 KiB

#include "tangent_plan.cuh"

namespace scm {
namespace cuda {
namespace {

struct NormParams {
  Samples samples;
  double* sums;  // [b, parts]
};

struct SumParams {
  const double* sums;  // [b, parts]
  double* squares;     // [b]
  unsigned parts;
};

template <class T, int kVec>
__device__ void norm(const NormParams& p) {
  const Share<T, kVec> share(p.samples, blockIdx.x);
  double sum = 0.0;
  share.all([&](int64_t, const float (&g)[kVec]) { sum = add_squares(g, sum); });
  sum = add_up(sum, share.lanes);
  if (share.live && share.lane == 0) p.sums[share.row * p.samples.parts + share.part] = sum;
}

SCM_TANGENT_KERNELS(kVectors, norm, NormParams, 4, 8)
SCM_TANGENT_KERNELS(kElements, norm, NormParams, 1, 1)

// The sums of a sample's parts, a block each.
extern "C" __global__ void __launch_bounds__(kThreads) tangent_sum_kernel(const SumParams p) {
  const double sum = add_parts(p.sums, blockIdx.x, p.parts);
  if (threadIdx.x == 0) p.squares[blockIdx.x] = sum;
}

}  // namespace

cudaError_t usable(int device) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? cudaFuncGetAttributes(&attributes, tangent_sum_kernel) : error;
}

int64_t tangent_sums(int64_t b, int64_t d) { return d <= kWhole ? 0 : b * cut(b, d).parts; }

cudaError_t launch_tangent_sums(const Tangent& problem, Cut cut, double* sums, Queue& queue) {
  Plan plan(problem, nullptr);
  plan.share(cut);
  return plan.launch(queue, kVectors, kElements, 0, NormParams{plan.samples, sums});
}

cudaError_t launch_tangent_norm(const TangentNorm& problem, Queue& queue) {
  if (!known(problem)) return cudaErrorNotSupported;
  const Cut parts = cut(problem.b, problem.d);
  if (parts.parts == 1) return launch_tangent_sums(problem, parts, problem.squares, queue);
  const cudaError_t error = launch_tangent_sums(problem, parts, problem.sums, queue);
  if (error != cudaSuccess) return error;
  return queue.launch(tangent_sum_kernel, "tangent_sum_kernel", problem.b, kThreads, 0,
                      SumParams{problem.sums, problem.squares, static_cast<unsigned>(parts.parts)});
}

}  // namespace cuda
}  // namespace scm
