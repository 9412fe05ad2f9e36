// The online softmax of primal and tangent, for the two rows of a thread.
//
//     p = 2^(x - top)          x the scores times scale log2(e)
//     h = p (T - shift)        T the scores' tangent
//     l = sum p   mu = sum h   both before rounding: what lse and the returned mu are made of
//
// `top` is no running maximum: it is raised where p would otherwise exceed 2^kMost, for all rows of
// a warp at once. So most tiles cost no rescale of what has been accumulated. All of l, mu and the
// accumulators carry the same 2^-top, which leaves with the division by l.
#pragma once

#include <cfloat>

#include "ptx.cuh"

namespace scm {
namespace cuda {

// The four lanes of a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// float16 ends at 65504, where eager's T ends too, so p stays below 1; and close to it, as small p
// and h lose digits. bfloat16 has the range of float32, of which the accumulators want a part.
template <class T>
struct Range {
  static constexpr bool kNarrow = std::is_same_v<T, __half>;
  static constexpr float kMost = kNarrow ? 0.0f : 8.0f;      // p is at most 2^kMost
  static constexpr float kHeadroom = kNarrow ? 2.0f : 0.0f;  // a new top is this much too high
};

struct DualSoftmax {
  float top[2] = {-FLT_MAX, -FLT_MAX};  // finite: scores of -inf alone leave it, and p is 0
  float sum[2] = {0.0f, 0.0f}, mean[2] = {0.0f, 0.0f};  // l and mu, this lane's part

  // Whether one of this lane's scores, of which the largest are given, wants a higher top.
  template <class T>
  __device__ __forceinline__ bool high(const float (&most)[2]) const {
    return most[0] > top[0] + Range<T>::kMost || most[1] > top[1] + Range<T>::kMost;
  }

  // New tops for rows whose largest score in this tile, times scale log2(e), is `most`, and the
  // factors of what has been accumulated so far.
  __device__ __forceinline__ void raise(const float (&most)[2], float headroom,
                                        float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float next = fmaxf(top[r], row_max(most[r]) + headroom);
      factor[r] = exp2_approximate(top[r] - next);
      top[r] = next;
      sum[r] *= factor[r], mean[r] *= factor[r];
    }
  }
};

}  // namespace cuda
}  // namespace scm
