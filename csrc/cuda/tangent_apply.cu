// out = a F + b V + k X + d J for each sample: also the gradient of the loss, which is one more g
// (scm_kernels/tangent/reference.py). Combined in float32.
//
// A thread takes four vectors of 16 bytes.
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

struct ApplyParams {
  Samples samples;
  char* out;
};

// Vectors that a thread applies.
constexpr int64_t kApplied = 4;

template <class T, int kVec>
__device__ void apply(const ApplyParams& p) {
  const Share<T, kVec> share(p.samples, blockIdx.x);
  char* const out = p.out + share.before;
  if (share.any) {
    share.all([&](int64_t at, const float (&g)[kVec]) { write<T>(out + at * share.kBytes, g); });
    return;
  }
  // A sample that is left out is not read: it may hold NaN.
  const float zeros[kVec] = {};
  for (int64_t at = share.first; at < share.last; at += share.lanes) {
    write<T>(out + at * share.kBytes, zeros);
  }
}

SCM_TANGENT_KERNELS(kVectors, apply, ApplyParams, 4, 8)
SCM_TANGENT_KERNELS(kElements, apply, ApplyParams, 1, 1)

}  // namespace

cudaError_t launch_tangent_apply(const TangentApply& problem, Queue& queue) {
  if (!known(problem)) return cudaErrorNotSupported;
  Plan plan(problem, problem.out);
  const int64_t each = kApplied * kThreads * plan.width;
  plan.share(problem.d <= each ? Cut{1, problem.d} : Cut{up(problem.d, each), each});
  return plan.launch(queue, kVectors, kElements, 0, ApplyParams{plan.samples, problem.out});
}

}  // namespace cuda
}  // namespace scm
