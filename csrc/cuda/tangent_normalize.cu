// g = a F + b V + k X + d J of each sample over its norm: the formulas of
// scm_kernels/tangent/reference.py. g is combined in float32, its squares are summed in float64.
//
// Each input is read once: g waits for its norm where its thread computed it, in registers or in
// the thread's own place in shared memory. A sample that does not fit, or is one of a few large
// ones, takes two kernels: the sums of its parts (tangent_norm.cu), then the parts again
// (tangent_scale.cu).
//
// The versions, by the bytes of the 32-byte sectors that normalising asks for in bfloat16, over the
// least there is (modelled: ptxsim's counts), and by ptxas's registers for sm_80:
//
//                                                      4096 x 64   64 x 16384   33 x 65536
//   two kernels, each of which reads all inputs                        1.80         1.82
//   g kept, in registers and then in shared memory        1.143        1.006
//   the same with more registers: 65,536 elements                                   1.0015
//   coefficients once a warp, by four threads each        1.000        1.001        1.0003
//
//   two vectors of each input on their way, not one: 77 to 98 registers
//   a kernel of its own for samples of two vectors a thread: 98 to 47, and so 10 blocks of 128
//   threads on a multiprocessor, not 4
//   wide blocks of 384 threads with 128 elements in registers each spilled; 256 with 160 do not

#include "tangent_plan.cuh"

namespace scm {
namespace cuda {
namespace {

// A block keeps g in registers, this many elements a thread, then in shared memory: 96 KiB, of the
// 99 that any GPU since 8.0 gives a block. A wide block has a multiprocessor's registers to itself,
// 255 a thread.
constexpr int kKept = 32, kWideKept = 160, kShared = 24576;
static_assert(kThreads * kKept + kShared == kWhole);
// Up to this size several blocks share a multiprocessor.
constexpr int64_t kNarrow = 24576;
// With fewer samples than this, wide blocks leave multiprocessors idle: many parts are faster.
constexpr int64_t kWide = kThreads * kWideKept + kShared, kFew = 32;

// kSteps vectors a thread in registers, what is left of a sample in shared memory: of a small one
// nothing is.
template <class T, int kVec, int kSteps>
__device__ void normalize(const NormalizeParams& p) {
  constexpr bool kLong = kSteps > kBatch<kVec>;
  extern __shared__ __align__(16) float memory[];
  const Share<T, kVec> share(p.samples, blockIdx.x);
  const int lane = share.lane, lanes = share.lanes, last = share.last, start = kSteps * lanes;
  const Rest<kVec> rest{memory, last - start};
  float kept[kSteps][kVec];
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kSteps; i += kBatch<kVec>) {
    share.some(i * lanes + lane, last, [&](int j, int, const float (&g)[kVec]) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) kept[i + j][k] = g[k];
      sum = add_squares(g, sum);
    });
  }
  for (int at = start + lane; kLong && at < last; at += kBatch<kVec> * lanes) {
    share.some(at, last, [&](int, int vector, const float (&g)[kVec]) {
      sum = add_squares(g, sum);
      rest.put(vector - start, g);
    });
  }
  const Scale scale(p, add_up(sum, lanes));
  char* const out = p.out + share.before;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int vector = i * lanes + lane;
    if (vector < last) scale.template write<T>(out + int64_t{vector} * share.kBytes, kept[i]);
  }
  for (int slot = lane; kLong && start + slot < last; slot += lanes) {
    float g[kVec];
    rest.get(slot, g);
    scale.template write<T>(out + int64_t{start + slot} * share.kBytes, g);
  }
}

template <class T, int kVec>
__device__ void normalize_small(const NormalizeParams& p) {
  normalize<T, kVec, kBatch<kVec>>(p);
}

template <class T, int kVec>
__device__ void normalize(const NormalizeParams& p) {
  normalize<T, kVec, kKept / kVec>(p);
}

template <class T, int kVec>
__device__ void normalize_wide(const NormalizeParams& p) {
  normalize<T, kVec, kWideKept / kVec>(p);
}

SCM_TANGENT_KERNELS(kSmallVectors, normalize_small, NormalizeParams, 4, 8)
SCM_TANGENT_KERNELS(kSmallElements, normalize_small, NormalizeParams, 1, 1)
SCM_TANGENT_KERNELS(kVectors, normalize, NormalizeParams, 4, 8)
SCM_TANGENT_KERNELS(kElements, normalize, NormalizeParams, 1, 1)
SCM_TANGENT_KERNELS(kWideVectors, normalize_wide, NormalizeParams, 4, 8)

}  // namespace

cudaError_t launch_tangent_scaled(const TangentNormalize& problem, Queue& queue) {
  if (!known(problem)) return cudaErrorNotSupported;
  const int64_t d = problem.d;
  Plan plan(problem, problem.out);
  const bool wide = plan.vectors && d > kNarrow && d <= kWide && (d <= kWhole || problem.b >= kFew);
  if (d > kWhole && !wide) {
    const cudaError_t error = launch_tangent_sums(problem, cut(problem.b, d), problem.sums, queue);
    return error == cudaSuccess ? launch_tangent_scale(problem, queue) : error;
  }
  plan.share({1, d});
  const NormalizeParams params(problem, plan.samples);
  const int64_t rest = d - kThreads * (wide ? kWideKept : kKept);
  const int shared = static_cast<int>(std::max<int64_t>(rest, 0) * sizeof(float));
  if (wide) return plan.launch(queue, kWideVectors, kWideVectors, shared, params);
  if (d <= kThreads * plan.width * (plan.vectors ? kBatch<8> : kBatch<1>)) {
    return plan.launch(queue, kSmallVectors, kSmallElements, 0, params);
  }
  return plan.launch(queue, kVectors, kElements, shared, params);
}

}  // namespace cuda
}  // namespace scm
