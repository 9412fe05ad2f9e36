// A warpgroup of a Hopper kernel of attention that has rows: their products and their softmax.
#pragma once

#include "attention_hopper_copier.cuh"
#include "softmax.cuh"

namespace scm {
namespace cuda {

template <class K>
class Worker {
 public:
  __device__ __forceinline__ Worker(const Params& p, uint32_t shared) : p_(p), shared_(shared) {}

  // The two warpgroups start their products in turns, strictly, from the first rows to the last
  // ones; but for the first scores of rows and their last outputs, which are out of turn.
  __device__ __forceinline__ void run() {
    if (group() == 1) arrive_threads(turn(0), 256);
    for (int round = 0; round * int(gridDim.x) < p_.blocks; ++round) {
      if (assigned(round) < p_.blocks) work(round);
    }
    if (group() == 0) sync_threads(turn(0), 256);
  }

 private:
  using T = typename K::T;
  using Tile = typename K::Keys;
  static constexpr int kKeys = K::kN / 8;
  static constexpr int kMain = K::kPieces - Tile::kTail, kOut = kMain + 2 * Tile::kTail;

  __device__ __forceinline__ void work(int round) {
    const Place at = place(p_, assigned(round));
    row_ = at.row + group() * kGroupRows;
    const int tiles = key_tiles<K>(p_, at.row);
    load_queries(at);
    clear();
    if (tiles > 0) {
      wait_for_stage();
      begin_products();
      start_scores();
      wait_for_products<0>();
      settle(s_), settle(t_);
      for (int tile = 0; tile < tiles - 1; ++tile) {
        soften(tile);
        settle(out_), settle(t_out_), settle(rounded_);
        sync_threads(turn(group()), 256);
        begin_products();
        start_outputs();
        const uint32_t used = empty(shared_ + K::kBarriers, ring_.stage);
        ring_.advance();
        wait_for_stage();
        start_scores();
        arrive_threads(turn(1 - group()), 256);
        wait_for_products<1>();
        if (lane() == 0) arrive(used);
        wait_for_products<0>();
        settle(s_), settle(t_), settle(out_), settle(t_out_), settle(rounded_);
      }
      soften(tiles - 1);
      settle(out_), settle(t_out_), settle(rounded_);
      begin_products();
      start_outputs();
      wait_for_products<0>();
      if (lane() == 0) arrive(empty(shared_ + K::kBarriers, ring_.stage));
      ring_.advance();
      settle(out_), settle(t_out_), settle(rounded_);
    }
    finish(place(p_, assigned(round)));
  }

  // Read anew, as registers are short.
  static __device__ __forceinline__ int group() { return thread_again() / 128; }
  static __device__ __forceinline__ int lane() { return thread_again() % 32; }

  // The barrier at which a warpgroup waits for its turn.
  static __device__ __forceinline__ int turn(int group) { return 4 + group; }

  // The tile of the ring's stage is there.
  __device__ __forceinline__ void wait_for_stage() const {
    wait(full(shared_ + K::kBarriers, ring_.stage), ring_.phase);
    publish();
  }

  // --- queries ---

  __device__ __forceinline__ uint32_t q() const {
    return shared_ + K::kQueries + 2 * group() * K::kQ;
  }

  __device__ __forceinline__ void load_queries(const Place& at) {
    const Rows q = rows(p_.q, at.batch, at.head), tq = rows(p_.tq, at.batch, at.head);
    if constexpr (K::kKeepQ) {
      load(q_, q), load(tq_, tq);
    } else {
      sync_threads(1 + group(), 128);  // nobody needs the last ones any more
      store(this->q(), q), store(this->q() + K::kQ, tq);
      publish();
      sync_threads(1 + group(), 128);
    }
  }

  // This thread's part of this warp's rows, with the sign of the scale.
  __device__ __forceinline__ void load(uint32_t (&x)[K::kSteps][4], const Rows& from) const {
#pragma unroll
    for (int step = 0; step < K::kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = step * 16 + i / 2 * 8 + lane() % 4 * 2;
        const char* at = from.data + row(i % 2) * from.stride + 2 * column;
        x[step][i] = row(i % 2) < p_.m ? *reinterpret_cast<const uint32_t*>(at) ^ p_.flip : 0;
      }
    }
  }

  // This warpgroup's rows into shared memory, with the sign of the scale; zeros after the features.
  __device__ __forceinline__ void store(uint32_t to, const Rows& from) const {
    constexpr int kAll = 2 * K::kSteps;
    for (int i = threadIdx.x % 128; i < kGroupRows * kAll; i += 128) {
      const int line = i / kAll, piece = i % kAll;
      uint4 x{0, 0, 0, 0};
      if (row_ + line < p_.m && piece < K::kPieces) {
        x = *reinterpret_cast<const uint4*>(from.data + (row_ + line) * from.stride + piece * 16);
      }
      store_shared(to + K::Queries::at(line, piece),
                   uint4{x.x ^ p_.flip, x.y ^ p_.flip, x.z ^ p_.flip, x.w ^ p_.flip});
    }
  }

  // --- products ---

  // s = q k and t = tq k + q tk, of a tile's keys.
  __device__ __forceinline__ void start_scores() {
    const uint32_t k = shared_ + ring_.stage * K::kStage;
#pragma unroll
    for (int step = 0; step < K::kSteps; ++step) {
      const uint64_t keys = Tile::columns(k, step), t_keys = Tile::columns(k + Tile::kBytes, step);
      if constexpr (K::kKeepQ) {
        product<T, false>(s_, q_[step], keys, step > 0);
        product<T, false>(t_, tq_[step], keys, step > 0);
        if (K::kTKV) product<T, false>(t_, q_[step], t_keys, true);
      } else {
        const uint64_t q = K::Queries::columns(this->q(), step);
        product<T>(s_, q, keys, step > 0);
        product<T>(t_, K::Queries::columns(this->q() + K::kQ, step), keys, step > 0);
        if (K::kTKV) product<T>(t_, q, t_keys, true);
      }
    }
    commit_products();
  }

  // out += p v and t_out += h v + p tv; and the sums of p and h as they were rounded, by ones in
  // columns that alternate, or in the tail's columns that are no features.
  __device__ __forceinline__ void start_outputs() {
    const uint32_t v = shared_ + ring_.stage * K::kStage + K::kV, tv = v + Tile::kBytes;
#pragma unroll
    for (int step = 0; step < kKeys / 2; ++step) {
      const uint64_t values = Tile::lines(v, step);
      product<T, true>(part<0, kMain>(out_), weights_[step], values, true);
      product<T, true>(part<0, kMain>(t_out_), moments_[step], values, true);
      if (K::kTKV)
        product<T, true>(part<0, kMain>(t_out_), weights_[step], Tile::lines(tv, step), true);
      if constexpr (Tile::kTail) {
        const uint64_t tail = Tile::tail_lines(v, step);
        product<T, true>(part<kMain, 2>(out_), weights_[step], tail, true);
        product<T, true>(part<kMain, 2>(t_out_), moments_[step], tail, true);
        if (K::kTKV) {
          product<T, true>(part<kMain, 2>(t_out_), weights_[step], Tile::tail_lines(tv, step),
                           true);
        }
      } else {
        const uint32_t ones = shared_ + K::kOnesAt;
        product<T, true>(rounded_, weights_[step], operand(ones, Swizzling::kNone, 128, 128), true);
        product<T, true>(rounded_, moments_[step], operand(ones + 256, Swizzling::kNone, 128, 128),
                         true);
      }
    }
    commit_products();
  }

  // N times 8 columns of accumulators.
  template <int kFirst, int N, int kAll>
  static __device__ __forceinline__ float (&part(float (&x)[kAll][4])) [N][4] {
    static_assert(kFirst + N <= kAll);
    return reinterpret_cast<float (&)[N][4]>(x[kFirst]);
  }

  // --- softmax ---

  // The row of the head that this thread has: r = 0 and 1.
  __device__ __forceinline__ int row(int r) const {
    return row_ + thread_again() / 32 % 4 * 16 + 8 * r + lane() / 4;
  }

  // Keys that a row sees, from the first of a tile on.
  __device__ __forceinline__ int live(int r, int tile) const {
    return (p_.causal ? min(p_.n, row(r) + 1) : p_.n) - tile * K::kN;
  }

  // p and h of a tile, of its scores and their tangents.
  __device__ __forceinline__ void soften(int tile) {
    if ((tile + 1) * K::kN > (p_.causal ? min(p_.n, row_ + 1) : p_.n)) bound(tile);
    float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) most[i / 2] = fmaxf(most[i / 2], s_[n][i]);
    }
    most[0] *= p_.scale2, most[1] *= p_.scale2;
    if (__any_sync(kAllLanes, softmax_.high<T>(most))) raise(most, tile);
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float p0 = exp2_approximate(fmaf(s_[n][2 * r], p_.scale2, -softmax_.top[r]));
        const float p1 = exp2_approximate(fmaf(s_[n][2 * r + 1], p_.scale2, -softmax_.top[r]));
        const float h0 = p0 * fmaf(t_[n][2 * r], p_.scale, -shift_[r]);
        const float h1 = p1 * fmaf(t_[n][2 * r + 1], p_.scale, -shift_[r]);
        softmax_.sum[r] += p0 + p1, softmax_.mean[r] += h0 + h1;
        weights_[n / 2][n % 2 * 2 + r] = pack<T>(p0, p1);
        moments_[n / 2][n % 2 * 2 + r] = pack<T>(h0, h1);
      }
    }
  }

  // Of keys that a row does not see the score is -inf, and its tangent no matter.
  __device__ __forceinline__ void bound(int tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int end = live(i / 2, tile) - lane() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        if (8 * n + i % 2 >= end) s_[n][i] = -INFINITY, t_[n][i] = 0.0f;
      }
    }
  }

  // A higher top for the rows that want one; before the first tile also the shift, the mean of the
  // tangents over the keys that a row sees of it.
  __device__ __forceinline__ void raise(const float (&most)[2], int tile) {
    float factor[2];
    softmax_.raise(most, Range<T>::kHeadroom, factor);
    if (tile == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys; ++n) total += t_[n][2 * r] + t_[n][2 * r + 1];
        shift_[r] = row_sum(total) / min(live(r, 0), K::kN) * p_.scale;
      }
    }
    rescale(out_, factor), rescale(t_out_, factor), rescale(rounded_, factor);
  }

  // --- outputs ---

  template <int N>
  static __device__ __forceinline__ void rescale(float (&x)[N][4], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] *= factor[i / 2];
    }
  }

  __device__ __forceinline__ void clear() {
    softmax_ = DualSoftmax();
    shift_[0] = shift_[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < kOut; ++n) out_[n][i] = t_out_[n][i] = 0.0f;
      rounded_[0][i] = 0.0f;
    }
  }

  __device__ __forceinline__ void finish(const Place& at) const {
    const Rows out = rows(p_.out, at.batch, at.head), t_out = rows(p_.t_out, at.batch, at.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float l = row_sum(softmax_.sum[r]), mu = row_sum(softmax_.mean[r]);
      const bool none = l == 0.0f;  // there are no keys, or none with a score above -inf
      const float p_sum = Tile::kTail ? out_[kOut - 1][2 * r] : rounded_[0][2 * r];
      const float h_sum = Tile::kTail ? t_out_[kOut - 1][2 * r] : rounded_[0][2 * r + 1];
      // A NaN in h is one in both of the rounded sums (without a tail), and not to be one in out.
      const float inverse = none ? 0.0f : 1.0f / (p_sum < INFINITY ? p_sum : l);
      const float mean = none ? 0.0f : h_sum * inverse;
      if (row(r) >= p_.m) continue;
      if (lane() % 4 == 0) {
        const int64_t i = (static_cast<int64_t>(at.batch) * p_.heads + at.head) * p_.m + row(r);
        p_.lse[i] = none ? -INFINITY : (softmax_.top[r] + log2f(l)) * 0.6931471805599453f;
        p_.mu[i] = none ? 0.0f : mu / l + shift_[r];
      }
#pragma unroll
      for (int n = 0; n < K::kPieces; ++n) {
        const float x0 = out_[n][2 * r] * inverse, x1 = out_[n][2 * r + 1] * inverse;
        const float t0 = t_out_[n][2 * r] * inverse - mean * x0;
        const float t1 = t_out_[n][2 * r + 1] * inverse - mean * x1;
        const int column = 2 * (8 * n + lane() % 4 * 2);
        write(out.data + row(r) * out.stride + column, pack<T>(x0, x1));
        write(t_out.data + row(r) * t_out.stride + column, pack<T>(t0, t1));
      }
    }
  }

  static __device__ __forceinline__ void write(char* to, uint32_t x) {
    *reinterpret_cast<uint32_t*>(to) = x;
  }

  const Params& p_;
  const uint32_t shared_;
  int row_ = 0;  // this warpgroup's first
  Ring<K::kStages> ring_;
  uint32_t q_[K::kSteps][4], tq_[K::kSteps][4];  // where they stay
  float s_[kKeys][4], t_[kKeys][4];
  uint32_t weights_[kKeys / 2][4], moments_[kKeys / 2][4];  // p and h
  float out_[kOut][4], t_out_[kOut][4], rounded_[1][4];
  DualSoftmax softmax_;
  float shift_[2];
};

}  // namespace cuda
}  // namespace scm
