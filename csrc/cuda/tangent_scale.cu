// The second pass over samples too large for tangent_normalize.cu: g once more, scaled, when
// tangent_norm.cu has left the sums of its parts.
//
// The versions, by the bytes that a full multiprocessor has on their way to it (sm_80, from
// ptxas's registers; modelled):
//
//   a vector of each input at a time          54 registers     64 KiB
//   two, asked for before the first is used   79 registers    96 KiB

#include "tangent_plan.cuh"

namespace scm {
namespace cuda {
namespace {

// A part of a sample, once the sums of all of them are known.
template <class T, int kVec>
__device__ void scale(const NormalizeParams& p) {
  // From the end, of which the cache still holds most.
  const Share<T, kVec> share(p.samples, gridDim.x - 1 - blockIdx.x);
  const Scale scaled(p, add_parts(p.sums, share.row, p.samples.parts));
  char* const out = p.out + share.before;
  share.all(
      [&](int64_t at, float (&g)[kVec]) { scaled.template write<T>(out + at * share.kBytes, g); });
}

SCM_TANGENT_KERNELS(kVectors, scale, NormalizeParams, 4, 8)
SCM_TANGENT_KERNELS(kElements, scale, NormalizeParams, 1, 1)

}  // namespace

cudaError_t launch_tangent_scale(const TangentNormalize& problem, Queue& queue) {
  Plan plan(problem, problem.out);
  plan.share(cut(problem.b, problem.d));
  return plan.launch(queue, kVectors, kElements, 0, NormalizeParams(problem, plan.samples));
}

}  // namespace cuda
}  // namespace scm
