// The tangent g = a F + b V + k X + d J of each sample, its norm, and g normalised: the formulas of
// scm_kernels/tangent/reference.py, whose loss and its gradient are numbers made of the norm and
// one more apply. g is combined in float32, its squares are summed in float64.
//
// A sample has an owner: 4 to 32 threads of a warp, several samples a block, or a block, or, if it
// is large, a block for each part. A thread takes every lanes-th vector of 16 bytes, and asks for
// two of each input before it uses the first. To normalise, g waits for its norm where its thread
// computed it, in registers or in the thread's own place in shared memory, so each input is read
// once. A sample that does not fit, or is one of a few large ones, takes two kernels: the sums of
// its parts, then the parts again, each block adding those sums up. Nothing is atomic: the order of
// a sum is that of the vectors of a thread, the threads of a warp as a tree, the warps, the parts.
//
// Rows that do not all start and end at multiples of 16 bytes are read by single elements: right,
// not fast.
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

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "tangent_sample.cuh"

namespace scm {
namespace cuda {

struct NormParams {
  Samples samples;
  double* sums;  // [b, parts]
};

struct SumParams {
  const double* sums;  // [b, parts]
  double* squares;     // [b]
  unsigned parts;
};

struct ApplyParams {
  Samples samples;
  char* out;
};

struct NormalizeParams {
  Samples samples;
  const double* sums;  // [b, parts], of samples in parts
  char* out;
  double count, c;
  float lost;  // what a sample becomes that is not finite
};

namespace {

// Threads of a block, at most, and of one that shares out several samples.
constexpr int kThreads = 256, kSeveral = 128;
// Vectors of a sample that shares its block, at most: two for each thread of a warp.
constexpr int64_t kSmall = 64;
// Vectors that a thread applies.
constexpr int64_t kApplied = 4;
// A normalising block keeps g in registers, this many elements a thread, then in shared memory: 96
// KiB, of the 99 that any GPU since 8.0 gives a block. A wide block has a multiprocessor's
// registers to itself, 255 a thread.
constexpr int kKept = 32, kWideKept = 160, kShared = 24576;
// A sample up to this size is one block's. Larger ones are cut into parts of whole tiles, for about
// kBlocks blocks, at most kParts parts: to scale, each block adds their sums up again.
constexpr int64_t kWhole = kThreads * kKept + kShared, kTile = 4096, kBlocks = 2048, kParts = 256;
// Up to this size several blocks share a multiprocessor.
constexpr int64_t kNarrow = 24576;
// A wide block is a multiprocessor's: with fewer samples than this, many in parts are faster.
constexpr int64_t kWide = kThreads * kWideKept + kShared, kFew = 32;

template <class T, int kVec>
__device__ void norm(const NormParams& p) {
  const Share<T, kVec> share(p.samples, blockIdx.x);
  double sum = 0.0;
  share.all([&](int64_t, const float (&g)[kVec]) { sum = add_squares(g, sum); });
  sum = add_up(sum, share.lanes);
  if (share.live && share.lane == 0) p.sums[share.row * p.samples.parts + share.part] = sum;
}

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

__device__ float scale(const NormalizeParams& p, double squares) {
  return static_cast<float>(1.0 / (sqrt(squares / p.count) + p.c));
}

template <class T, int kVec>
__device__ void write_scaled(char* to, float (&g)[kVec], float s, bool finite, float lost) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) g[j] = finite ? g[j] * s : lost;
  write<T>(to, g);
}

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
  sum = add_up(sum, lanes);
  const bool finite = sum < INFINITY;
  const float s = scale(p, sum);
  char* const out = p.out + share.before;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int vector = i * lanes + lane;
    if (vector < last) {
      write_scaled<T>(out + int64_t{vector} * share.kBytes, kept[i], s, finite, p.lost);
    }
  }
  for (int slot = lane; kLong && start + slot < last; slot += lanes) {
    float g[kVec];
    rest.get(slot, g);
    write_scaled<T>(out + int64_t{start + slot} * share.kBytes, g, s, finite, p.lost);
  }
}

// A part of a sample, once the sums of all of them are known.
template <class T, int kVec>
__device__ void normalize_part(const NormalizeParams& p) {
  // From the end, of which the cache still holds most.
  const Share<T, kVec> share(p.samples, gridDim.x - 1 - blockIdx.x);
  const double sum = add_parts(p.sums, share.row, p.samples.parts);
  const bool finite = sum < INFINITY;
  const float s = scale(p, sum);
  char* const out = p.out + share.before;
  share.all([&](int64_t at, float (&g)[kVec]) {
    write_scaled<T>(out + at * share.kBytes, g, s, finite, p.lost);
  });
}

template <class Params>
struct Kernel {
  void (*run)(Params);
  const char* name;

  cudaError_t operator()(Queue& queue, int64_t blocks, int threads, int shared,
                         const Params& params) const {
    return queue.launch(run, name, blocks, threads, shared, params);
  }
};

struct Kernels {
  Kernel<NormParams> norm;
  Kernel<ApplyParams> apply;
  Kernel<NormalizeParams> normalize_small, normalize, normalize_wide, scale;
};

}  // namespace

extern "C" {

__global__ void __launch_bounds__(kThreads) tangent_sum_kernel(const SumParams p) {
  const double sum = add_parts(p.sums, blockIdx.x, p.parts);
  if (threadIdx.x == 0) p.squares[blockIdx.x] = sum;
}

// Readable names in the machine code, of a type and the elements of an access.
#define TANGENT_KERNEL(STEP, PARAMS, ...)                                                       \
  __global__ void __launch_bounds__(kThreads) STEP##_kernel(const __grid_constant__ PARAMS p) { \
    __VA_ARGS__(p);                                                                             \
  }
#define TANGENT_KERNELS(NAME, T, VEC)                                                             \
  TANGENT_KERNEL(tangent_norm_##NAME, NormParams, norm<T, VEC>)                                   \
  TANGENT_KERNEL(tangent_apply_##NAME, ApplyParams, apply<T, VEC>)                                \
  TANGENT_KERNEL(tangent_normalize_small_##NAME, NormalizeParams, normalize<T, VEC, kBatch<VEC>>) \
  TANGENT_KERNEL(tangent_normalize_##NAME, NormalizeParams, normalize<T, VEC, kKept / VEC>)       \
  TANGENT_KERNEL(tangent_scale_##NAME, NormalizeParams, normalize_part<T, VEC>)
#define TANGENT_WIDE_KERNEL(NAME, T, VEC) \
  TANGENT_KERNEL(tangent_normalize_wide_##NAME, NormalizeParams, normalize<T, VEC, kWideKept / VEC>)

TANGENT_KERNELS(f32x1, float, 1)
TANGENT_KERNELS(f32x4, float, 4)
TANGENT_KERNELS(bf16x1, __nv_bfloat16, 1)
TANGENT_KERNELS(bf16x8, __nv_bfloat16, 8)
TANGENT_KERNELS(f16x1, __half, 1)
TANGENT_KERNELS(f16x8, __half, 8)
TANGENT_WIDE_KERNEL(f32x4, float, 4)
TANGENT_WIDE_KERNEL(bf16x8, __nv_bfloat16, 8)
TANGENT_WIDE_KERNEL(f16x8, __half, 8)

}  // extern "C"

namespace {

#define TANGENT_ENTRY(STEP, NAME) \
  {tangent_##STEP##_##NAME##_kernel, "tangent_" #STEP "_" #NAME "_kernel"}
#define TANGENT_STEPS(NAME, WIDE)        \
  {TANGENT_ENTRY(norm, NAME),            \
   TANGENT_ENTRY(apply, NAME),           \
   TANGENT_ENTRY(normalize_small, NAME), \
   TANGENT_ENTRY(normalize, NAME),       \
   WIDE,                                 \
   TANGENT_ENTRY(scale, NAME)}
#define TANGENT_WIDE_STEPS(NAME) TANGENT_STEPS(NAME, TANGENT_ENTRY(normalize_wide, NAME))

// Of each type, in accesses of 16 bytes and of one element.
const Kernels kKernels[3][2] = {
    {TANGENT_WIDE_STEPS(f32x4), TANGENT_STEPS(f32x1, {})},
    {TANGENT_WIDE_STEPS(bf16x8), TANGENT_STEPS(bf16x1, {})},
    {TANGENT_WIDE_STEPS(f16x8), TANGENT_STEPS(f16x1, {})},
};

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parts of a sample, and elements of each but the last.
struct Cut {
  int64_t parts, each;
};

Cut cut(const Tangent& p) {
  if (p.d <= kWhole) return {1, p.d};
  const int64_t tiles = up(p.d, kTile);
  const int64_t each = std::max({p.b * tiles / kBlocks, up(tiles, kParts), int64_t{1}});
  return {up(tiles, each), each * kTile};
}

// Whether all rows start and end at multiples of 16 bytes.
bool aligned(const Tangent& p, const char* out, int64_t size) {
  uint64_t all = reinterpret_cast<uintptr_t>(out) | p.d * size;
  for (int i = 0; i < 4; ++i) {
    all |= reinterpret_cast<uintptr_t>(p.input[i]);
    if (p.b > 1) all |= p.stride[i] * size;
  }
  return all % 16 == 0;
}

// What a step launches: kernels for the problem's type and access, and a grid.
struct Plan {
  Plan(const Tangent& p, const char* out)
      : size(p.type == Type::kFloat32 ? 4 : 2),
        vectors(aligned(p, out, size)),
        width(vectors ? 16 / size : 1),
        kernels(kKernels[static_cast<int>(p.type)][vectors ? 0 : 1]) {
    for (int i = 0; i < 4; ++i) {
      samples.input[i] = p.input[i];
      samples.stride[i] = p.stride[i] * size;
    }
    samples.coefficients = p.coefficients;
    samples.b = p.b;
    samples.size = p.d / width;
  }

  // Samples that are small share a block; others have a block for each part.
  void share(Cut cut) {
    samples.parts = static_cast<unsigned>(cut.parts);
    samples.part = up(cut.each, width);
    if (cut.parts == 1 && samples.size <= kSmall) {
      for (samples.lanes = 4; samples.lanes < 32 && samples.lanes < samples.size;) {
        samples.lanes *= 2;
      }
      threads = kSeveral;
      blocks = up(samples.b, threads / samples.lanes);
    } else {
      threads = static_cast<int>(std::min<int64_t>(kThreads, up(samples.part, 32) * 32));
      samples.lanes = threads;
      blocks = samples.b * cut.parts;
    }
  }

  int64_t size;  // bytes of an element
  bool vectors;
  int64_t width;  // elements of a vector
  const Kernels& kernels;
  Samples samples;
  int64_t blocks;
  int threads;
};

bool known(const Tangent& p) {
  return p.type == Type::kFloat32 || p.type == Type::kBFloat16 || p.type == Type::kFloat16;
}

// sums [b, parts] of each part.
cudaError_t sum_parts(const Tangent& p, Cut cut, double* sums, Queue& queue) {
  Plan plan(p, nullptr);
  plan.share(cut);
  return plan.kernels.norm(queue, plan.blocks, plan.threads, 0, {plan.samples, sums});
}

}  // namespace

cudaError_t usable(int device) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? cudaFuncGetAttributes(&attributes, tangent_sum_kernel) : error;
}

int64_t tangent_sums(const Tangent& problem) {
  return problem.d <= kWhole ? 0 : problem.b * cut(problem).parts;
}

cudaError_t launch_tangent_norm(const TangentNorm& problem, double* sums, Queue& queue) {
  if (!known(problem)) return cudaErrorNotSupported;
  const Cut parts = cut(problem);
  if (parts.parts == 1) return sum_parts(problem, parts, problem.squares, queue);
  const cudaError_t error = sum_parts(problem, parts, sums, queue);
  if (error != cudaSuccess) return error;
  return queue.launch(tangent_sum_kernel, "tangent_sum_kernel", problem.b, kThreads, 0,
                      SumParams{sums, problem.squares, static_cast<unsigned>(parts.parts)});
}

cudaError_t launch_tangent_apply(const TangentApply& problem, Queue& queue) {
  if (!known(problem)) return cudaErrorNotSupported;
  Plan plan(problem, problem.out);
  const int64_t each = kApplied * kThreads * plan.width;
  plan.share(problem.d <= each ? Cut{1, problem.d} : Cut{up(problem.d, each), each});
  return plan.kernels.apply(queue, plan.blocks, plan.threads, 0, {plan.samples, problem.out});
}

cudaError_t launch_tangent_normalize(const TangentNormalize& problem, double* sums, Queue& queue) {
  if (!known(problem)) return cudaErrorNotSupported;
  const TangentNormalize& p = problem;
  Plan plan(p, p.out);
  const float lost = p.zero ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  NormalizeParams params{plan.samples, sums, p.out, p.count, p.c, lost};
  const bool wide = plan.vectors && p.d > kNarrow && p.d <= kWide && (p.d <= kWhole || p.b >= kFew);
  if (p.d > kWhole && !wide) {
    const cudaError_t error = sum_parts(p, cut(p), sums, queue);
    if (error != cudaSuccess) return error;
    plan.share(cut(p));
    params.samples = plan.samples;
    return plan.kernels.scale(queue, plan.blocks, plan.threads, 0, params);
  }
  plan.share({1, p.d});
  params.samples = plan.samples;
  const bool small = p.d <= kThreads * (plan.vectors ? kBatch<8> : kBatch<1>)*plan.width;
  const auto& kernel = wide    ? plan.kernels.normalize_wide
                       : small ? plan.kernels.normalize_small
                               : plan.kernels.normalize;
  const int64_t rest = p.d - kThreads * (wide ? kWideKept : kKept);
  const int shared = static_cast<int>(std::max<int64_t>(rest, 0) * sizeof(float));
  return kernel(queue, plan.blocks, plan.threads, shared, params);
}

}  // namespace cuda
}  // namespace scm
