// A warp's rows of the outputs while they are accumulated, and their way to global memory.
#pragma once

#include "attention_kind.cuh"

namespace scm {
namespace cuda {

template <class K>
class Outputs {
 public:
  // The sums of p and of h as they were rounded for the products, of row 0 and of row 1: what the
  // accumulators are divided by, so that a rounding cancels.
  __device__ __forceinline__ float sum(int r) const { return rounded_[2 * r]; }
  __device__ __forceinline__ float mean(int r) const { return rounded_[2 * r + 1]; }

  // out += p v and t_out += h v + p tv. A fragment of v serves both of its products.
  __device__ __forceinline__ void add(const uint32_t (&p)[kKeys / 2][4],
                                      const uint32_t (&h)[kKeys / 2][4], uint32_t v) {
    const int row = lane_ % 16, column = lane_ / 16;
#pragma unroll
    for (int j = 0; j < kKeys / 2; ++j) {
      // Ones in columns that alternate: both sums in one set of accumulators.
      const uint32_t even = lane_ / 4 % 2 == 0 ? kOnes<T> : 0u, odd = even ^ kOnes<T>;
      product<T>(rounded_, p[j], even, even, rounded_);
      if (K::kMoving) product<T>(rounded_, h[j], odd, odd, rounded_);
#pragma unroll
      for (int g = 0; g < K::kGroups / 2; ++g) {
        const uint32_t from = v + j * 16 * S::kRowBytes + S::at(row, column, 2 * g);
        uint32_t b[4];
        load_matrices<true>(b, from);
        add_primal(2 * g, p[j], h[j], b[0], b[1]);
        add_primal(2 * g + 1, p[j], h[j], b[2], b[3]);
        if (K::kTV) {
          load_matrices<true>(b, from + K::kTile);
          add_tangent(2 * g, p[j], b[0], b[1]);
          add_tangent(2 * g + 1, p[j], b[2], b[3]);
        }
      }
    }
    if (K::kHalf) add_half(p, h, v);
  }

  // All rows times factors, one for each of this lane's two.
  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int g = 0; g < K::kGroups; ++g) {
        out_[g][i] *= factor[i / 2];
        if (K::kTangent) t_out_[g][i] *= factor[i / 2];
      }
      rounded_[i] *= factor[i / 2];
    }
  }

  // out = out / l and t_out = t_out / l - mu out, mu divided by l already.
  __device__ __forceinline__ void normalize(const float (&inverse)[2], const float (&mu)[2]) {
#pragma unroll
    for (int g = 0; g < K::kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out_[g][i] *= inverse[i / 2];
        if (K::kTangent) t_out_[g][i] = t_out_[g][i] * inverse[i / 2] - mu[i / 2] * out_[g][i];
      }
    }
  }

  // This block's rows, `row` the first, those from `end` on left out, by way of shared memory,
  // which nobody else uses now.
  __device__ __forceinline__ void store(const Rows& out, const Rows& t_out, uint32_t shared,
                                        int row, int end) const {
    store(out, out_, shared, row, end);
    store(t_out, t_out_, shared + (K::kTangent ? K::kRows : 0), row, end);
  }

 private:
  using T = typename K::T;
  using S = Swizzle<K::kD>;

  __device__ __forceinline__ void add_primal(int g, const uint32_t (&p)[4], const uint32_t (&h)[4],
                                             uint32_t b0, uint32_t b1) {
    product<T>(out_[g], p, b0, b1, out_[g]);
    if (K::kMoving) product<T>(t_out_[g], h, b0, b1, t_out_[g]);
  }

  __device__ __forceinline__ void add_tangent(int g, const uint32_t (&p)[4], uint32_t b0,
                                              uint32_t b1) {
    product<T>(t_out_[g], p, b0, b1, t_out_[g]);
  }

  // The last 8 features: 32 keys a load.
  __device__ __forceinline__ void add_half(const uint32_t (&p)[kKeys / 2][4],
                                           const uint32_t (&h)[kKeys / 2][4], uint32_t v) {
    constexpr int g = K::kGroups - 1;
#pragma unroll
    for (int j = 0; j < kKeys / 2; j += 2) {
      const uint32_t from = v + j * 16 * S::kRowBytes + S::at(lane_, g);
      uint32_t b[4];
      load_matrices<true>(b, from);
      add_primal(g, p[j], h[j], b[0], b[1]);
      add_primal(g, p[j + 1], h[j + 1], b[2], b[3]);
      if (K::kTV) {
        load_matrices<true>(b, from + K::kTile);
        add_tangent(g, p[j], b[0], b[1]);
        add_tangent(g, p[j + 1], b[2], b[3]);
      }
    }
  }

  // In pieces of 16 bytes, rounded.
  __device__ __forceinline__ void store(const Rows& to, const float (&x)[K::kGroups][4],
                                        uint32_t shared, int row, int end) const {
    const int first = threadIdx.x / 32 * kWarpM;
#pragma unroll
    for (int g = 0; g < K::kGroups; ++g) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        store_shared(shared + S::at(first + 8 * r + lane_ / 4, g) + lane_ % 4 * 4,
                     pack<T>(x[g][2 * r], x[g][2 * r + 1]));
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < (kWarpM * K::kGroups + 31) / 32; ++i) {
      const int at = 32 * i + lane_, line = first + at / K::kGroups, piece = at % K::kGroups;
      if (at < kWarpM * K::kGroups && row + line < end) {
        *reinterpret_cast<uint4*>(to.data + (row + line) * to.stride + piece * 16) =
            load_shared(shared + S::at(line, piece));
      }
    }
    __syncwarp();
  }

  const int lane_ = threadIdx.x % 32;
  float out_[K::kGroups][4] = {}, t_out_[K::kGroups][4] = {}, rounded_[4] = {};
};

}  // namespace cuda
}  // namespace scm
