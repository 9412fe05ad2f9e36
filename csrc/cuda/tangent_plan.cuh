// What the hosts of the tangent's kernels share: who owns a sample, a kernel for each type and
// access, the launch.
//
// A sample has an owner: 4 to 32 threads of a warp, several samples a block, or a block, or, if it
// is large, a block for each part. Rows that do not all start and end at multiples of 16 bytes are
// read by single elements: right, not fast. Nothing is atomic: the order of a sum is that of the
// vectors of a thread, the threads of a warp as a tree, the warps, the parts.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "tangent_sample.cuh"

namespace scm {
namespace cuda {

// Threads of a block, at most, and of one that shares out several samples.
constexpr int kThreads = 256, kSeveral = 128;
// Vectors of a sample that shares its block, at most: two for each thread of a warp.
constexpr int64_t kSmall = 64;
// A sample up to this size is one block's. Larger ones are cut into parts of whole tiles, for about
// kBlocks blocks, at most kParts parts: to scale, each block adds their sums up again.
constexpr int64_t kWhole = 32768, kTile = 4096, kBlocks = 2048, kParts = 256;

template <class Params>
struct Kernel {
  void (*run)(Params);
  const char* name;
};

// The kernels STEP<T, kVec> of a step, and a table of them by Type: WORD elements an access of
// float, HALF of the others. Readable names in the machine code: tangent_norm_bf16x8_kernel.
#define SCM_TANGENT_KERNELS(TABLE, STEP, PARAMS, WORD, HALF)             \
  SCM_TANGENT_KERNEL(STEP, PARAMS, f32x##WORD, float, WORD)              \
  SCM_TANGENT_KERNEL(STEP, PARAMS, bf16x##HALF, __nv_bfloat16, HALF)     \
  SCM_TANGENT_KERNEL(STEP, PARAMS, f16x##HALF, __half, HALF)             \
  const Kernel<PARAMS> TABLE[3] = {SCM_TANGENT_ENTRY(STEP, f32x##WORD),  \
                                   SCM_TANGENT_ENTRY(STEP, bf16x##HALF), \
                                   SCM_TANGENT_ENTRY(STEP, f16x##HALF)};
#define SCM_TANGENT_KERNEL(STEP, PARAMS, NAME, T, VEC)                     \
  extern "C" __global__ void __launch_bounds__(kThreads)                   \
      tangent_##STEP##_##NAME##_kernel(const __grid_constant__ PARAMS p) { \
    STEP<T, VEC>(p);                                                       \
  }
#define SCM_TANGENT_ENTRY(STEP, NAME) \
  {tangent_##STEP##_##NAME##_kernel, "tangent_" #STEP "_" #NAME "_kernel"}

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parts of a sample, and elements of each but the last.
struct Cut {
  int64_t parts, each;
};

inline Cut cut(int64_t b, int64_t d) {
  if (d <= kWhole) return {1, d};
  const int64_t tiles = up(d, kTile);
  const int64_t each = std::max({b * tiles / kBlocks, up(tiles, kParts), int64_t{1}});
  return {up(tiles, each), each * kTile};
}

// How a step goes over a problem's samples.
struct Plan {
  Plan(const Tangent& p, const char* out) : type(static_cast<int>(p.type)) {
    const int64_t size = p.type == Type::kFloat32 ? 4 : 2;
    vectors = aligned(p, out, size);
    width = vectors ? 16 / size : 1;
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

  // The kernel for this type and access.
  template <class Params>
  cudaError_t launch(Queue& queue, const Kernel<Params> (&by_vectors)[3],
                     const Kernel<Params> (&by_elements)[3], int shared,
                     const Params& params) const {
    const Kernel<Params>& kernel = (vectors ? by_vectors : by_elements)[type];
    return queue.launch(kernel.run, kernel.name, blocks, threads, shared, params);
  }

  int type;       // the row of a table
  bool vectors;   // whether all rows start and end at multiples of 16 bytes
  int64_t width;  // elements of an access
  Samples samples;
  int64_t blocks;
  int threads;

 private:
  static bool aligned(const Tangent& p, const char* out, int64_t size) {
    uint64_t all = reinterpret_cast<uintptr_t>(out) | p.d * size;
    for (int i = 0; i < 4; ++i) {
      all |= reinterpret_cast<uintptr_t>(p.input[i]);
      if (p.b > 1) all |= p.stride[i] * size;
    }
    return all % 16 == 0;
  }
};

// Whether there are kernels for a problem's type.
inline bool known(const Tangent& p) {
  return p.type == Type::kFloat32 || p.type == Type::kBFloat16 || p.type == Type::kFloat16;
}

// sums [b, parts] of the squares of each part.
cudaError_t launch_tangent_sums(const Tangent& problem, Cut cut, double* sums, Queue& queue);
cudaError_t launch_tangent_norm(const TangentNorm& problem, Queue& queue);
// out = g over its norm: `launch_tangent_normalize`, once the coefficients are there.
cudaError_t launch_tangent_scaled(const TangentNormalize& problem, Queue& queue);
// The second pass of it over samples in parts, whose sums are there.
cudaError_t launch_tangent_scale(const TangentNormalize& problem, Queue& queue);

}  // namespace cuda
}  // namespace scm
