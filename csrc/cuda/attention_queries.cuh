// A warp's rows of q and tq, and their products with keys.
#pragma once

#include "attention_kind.cuh"

namespace scm {
namespace cuda {

template <class K>
class Queries {
 public:
  // From tiles in shared memory, with the signs in `flip` changed. `tq` may stay there.
  __device__ __forceinline__ void load(uint32_t q, uint32_t tq, uint32_t flip) {
    tile_ = tq;
    fragments(q_, q_half_, q, flip);
    if (K::kTQ && K::kKeepTQ) fragments(tq_, tq_half_, tq, flip);
    if (K::kTQ && !K::kKeepTQ) change(tq, flip);
  }

  // s = q k and t = tq k + q tk + t0, of a tile's keys. A fragment of k serves both of its
  // products.
  __device__ __forceinline__ void scores(float (&s)[kKeys][4], float (&t)[kKeys][4],
                                         const float (&t0)[4], uint32_t k) const {
    const float none[4] = {};
    const int row = lane_ / 16 * 8 + lane_ % 8, column = lane_ / 8 % 2;
#pragma unroll
    for (int step = 0; step < K::kSteps; ++step) {
      uint32_t b[kKeys / 2][4], tq[4];
      if (K::kTQ && !K::kKeepTQ) load_matrices<false>(tq, at(tile_, step));
#pragma unroll
      for (int tangent = 0; tangent <= K::kTK; ++tangent) {
#pragma unroll
        for (int j = 0; j < kKeys / 2; ++j) {
          load_matrices<false>(
              b[j], k + tangent * K::kTile + j * 16 * S::kRowBytes + S::at(row, column, 2 * step));
        }
#pragma unroll
        for (int n = 0; n < kKeys; ++n) {
          const uint32_t b0 = b[n / 2][n % 2 * 2], b1 = b[n / 2][n % 2 * 2 + 1];
          if (!tangent) product<T>(s[n], q_[step], b0, b1, step == 0 ? none : s[n]);
          if (!tangent && K::kTQ && K::kKeepTQ) {
            product<T>(t[n], tq_[step], b0, b1, step == 0 ? t0 : t[n]);
          } else if (!tangent && K::kTQ) {
            product<T>(t[n], tq, b0, b1, step == 0 ? t0 : t[n]);
          }
          if (tangent) product<T>(t[n], q_[step], b0, b1, step == 0 && !K::kTQ ? t0 : t[n]);
        }
      }
    }
    if (K::kHalf) scores_half(s, t, k);
  }

 private:
  using T = typename K::T;
  using S = Swizzle<K::kD>;
  static_assert(!K::kHalf || K::kKeepTQ);

  // This lane's part of the address of a step of 16 features.
  __device__ __forceinline__ uint32_t at(uint32_t tile, int step) const {
    const int row = threadIdx.x / 32 * kWarpM + lane_ % 16;
    return tile + S::at(row, lane_ / 16, 2 * step);
  }

  // The 8 features after the last step: four groups of keys a load.
  __device__ __forceinline__ void scores_half(float (&s)[kKeys][4], float (&t)[kKeys][4],
                                              uint32_t k) const {
#pragma unroll
    for (int tangent = 0; tangent <= K::kTK; ++tangent) {
#pragma unroll
      for (int j = 0; j < kKeys; j += 4) {
        uint32_t b[4];
        load_matrices<false>(
            b, k + tangent * K::kTile + j * 8 * S::kRowBytes + S::at(lane_, K::kGroups - 1));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (!tangent) product<T>(s[j + n], q_half_, b[n], s[j + n]);
          if (!tangent && K::kTQ) product<T>(t[j + n], tq_half_, b[n], t[j + n]);
          if (tangent) product<T>(t[j + n], q_half_, b[n], t[j + n]);
        }
      }
    }
  }

  __device__ __forceinline__ void fragments(uint32_t (&x)[K::kSteps][4], uint32_t (&half)[2],
                                            uint32_t tile, uint32_t flip) const {
#pragma unroll
    for (int step = 0; step < K::kSteps; ++step) {
      load_matrices<false>(x[step], at(tile, step));
#pragma unroll
      for (int i = 0; i < 4; ++i) x[step][i] ^= flip;
    }
    if (K::kHalf) {
      uint32_t both[4];
      const int row = threadIdx.x / 32 * kWarpM + lane_ % 16;
      load_matrices<false>(both, tile + S::at(row, K::kGroups - 1));
      half[0] = both[0] ^ flip, half[1] = both[1] ^ flip;
    }
  }

  // This warp's rows of a tile, in place.
  __device__ __forceinline__ void change(uint32_t tile, uint32_t flip) const {
    tile += threadIdx.x / 32 * kWarpM * S::kRowBytes;
#pragma unroll
    for (int i = lane_ * 16; i < kWarpM * S::kRowBytes; i += 32 * 16) {
      const uint4 x = load_shared(tile + i);
      store_shared(tile + i, uint4{x.x ^ flip, x.y ^ flip, x.z ^ flip, x.w ^ flip});
    }
    __syncwarp();
  }

  const int lane_ = threadIdx.x % 32;
  uint32_t q_[K::kSteps][4], tq_[K::kSteps][4], q_half_[2], tq_half_[2];
  uint32_t tile_;  // of tq
};

}  // namespace cuda
}  // namespace scm
