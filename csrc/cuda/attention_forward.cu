// Attention and its tangent in one pass over the keys, for sm_80 and later, bfloat16 and float16.
// The formulas: scm_kernels/attention/reference.py. Compiled once for each head dimension,
// SCM_HEAD_DIM.
//
// A block is 64 rows of a head, 16 a warp; their q and tq are operands in registers. Tiles of 32
// keys of k, tk, v and tv pass through two stages of shared memory: one is worked on while the
// other is filled, and a barrier a tile keeps the warps together.
//
// The versions, in TFLOP/s of 12 B H M N D operations on an A100, modelled from the machine code
// (bfloat16, no causal mask, all tangents), each against the kernel as it was then (it now makes
// 223, 243 and 230); what a step gains depends on the others, and 3% is noise:
//
//                                                          D = 64   112   128
//   as it was                                                 222   243   227
//   a running maximum, and a rescale in every tile            190   221   200   24 bytes spilled
//   the sums of the rounded p and h by additions              199   229   221    8 bytes spilled
//   the shift subtracted from t, not what it starts from      214   242   227
//   tq in registers at every D                                222   241   221    8 bytes spilled
//
//   Copies by four neighbours of a row, the next four of the next row, met in half of the banks:
//   1,408 of 8,576 wavefronts of shared memory at M = 64, N = 320, D = 64 (ptxsim). Now none do.
//   Three blocks a multiprocessor at D = 64, with 168 registers a thread: the same within noise.
//   The last tiles compiled for a causal mask and for the length alone, not for both: 0 to 4% more.

#include <tuple>

#include "attention_outputs.cuh"
#include "attention_params.cuh"
#include "attention_queries.cuh"
#include "kernels.h"
#include "softmax.cuh"

namespace scm {
namespace cuda {
namespace {

constexpr int kBlocks = 2;  // a multiprocessor

// Causal rows see more keys the later they are: the last ones first. No place is kept through the
// loops, where registers are short.
__device__ __forceinline__ Place place(const Params& p) {
  const int block = block_again(), head = block / p.tiles;
  return {head / p.heads, head % p.heads, (p.tiles - 1 - block % p.tiles) * kBlockM};
}

// Why a tile has keys that a row does not see: nothing, the number of keys, the causal mask too.
enum class Bounds { kNone, kLength, kCausal };

// What a warp knows and does.
template <class K>
class Warp {
 public:
  __device__ __forceinline__ Warp(const Params& p, uint32_t shared)
      : p_(p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    const Place at = place(p_);
    row_ = at.row;
    // Keys that all rows see, and that any does.
    const int first = p_.causal ? min(p_.n, row_ + 1) : p_.n;
    const int last = p_.causal ? min(p_.n, row_ + kBlockM) : p_.n;
    const int whole = first / kBlockN;
    tiles_ = (last + kBlockN - 1) / kBlockN;
    start(at.batch, at.head);
    pass<Bounds::kNone>(0, whole);
    if (p_.causal) {
      pass<Bounds::kCausal>(whole, tiles_);
    } else {
      pass<Bounds::kLength>(whole, tiles_);
    }
    finish();
  }

 private:
  using T = typename K::T;

  // --- copies ---

  __device__ __forceinline__ uint32_t stage(int tile) const {
    return shared_ + tile % 2 * K::kStage;
  }

  __device__ __forceinline__ void fetch(int tile) {
    const int first = tile * kBlockN;
    const unsigned thread = K::kAnew ? thread_again() : threadIdx.x;
    uint32_t to = stage(tile);
    copy_tile<K::kD, kBlockN, kThreads>(to, k_, first, p_.n, thread), to += K::kTile;
    if (K::kTK) copy_tile<K::kD, kBlockN, kThreads>(to, tk_, first, p_.n, thread), to += K::kTile;
    copy_tile<K::kD, kBlockN, kThreads>(to, v_, first, p_.n, thread), to += K::kTile;
    if (K::kTV) copy_tile<K::kD, kBlockN, kThreads>(to, tv_, first, p_.n, thread);
  }

  // q and tq to registers; the first tile there, the second one on its way.
  __device__ __forceinline__ void start(int batch, int head) {
    const int kv = head / p_.group;
    k_ = rows(p_.k, batch, kv), v_ = rows(p_.v, batch, kv);
    if (K::kTK) tk_ = rows(p_.tk, batch, kv);
    if (K::kTV) tv_ = rows(p_.tv, batch, kv);
    const uint32_t q = shared_ + K::kStage;
    const uint32_t tq = K::kKeepTQ ? q + K::kRows : shared_ + 2 * K::kStage;
    const auto copy = [this](uint32_t to, const Rows& x) {
      copy_tile<K::kD, kBlockM, kThreads>(to, x, row_, p_.m, threadIdx.x);
    };
    copy(q, rows(p_.q, batch, head));
    if (K::kTQ) copy(tq, rows(p_.tq, batch, head));
    commit_copies();
    if (tiles_ > 0) fetch(0);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    queries_.load(q, tq, p_.flip);
    __syncthreads();
    if (tiles_ > 1) fetch(1);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
  }

  // This tile has been used, the next one is there, and the one after it is on its way.
  __device__ __forceinline__ void advance(int tile) {
    wait_for_copies<0>();
    __syncthreads();
    if (tile + 2 < tiles_) fetch(tile + 2);
    commit_copies();
  }

  // --- softmax ---

  // The row of the block's 64 that this thread has: r = 0 and 1.
  __device__ __forceinline__ int row(int r) const {
    return row_ + threadIdx.x / 32 * kWarpM + 8 * r + lane_ / 4;
  }

  // Keys that a row sees, from the first of a tile on.
  template <Bounds kBounds>
  __device__ __forceinline__ int live(int r, int tile) const {
    return (kBounds == Bounds::kCausal ? min(p_.n, row(r) + 1) : p_.n) - tile * kBlockN;
  }

  // -inf for the keys that a row does not see.
  template <Bounds kBounds>
  __device__ __forceinline__ void bound(float (&s)[kKeys][4], int tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int end = live<kBounds>(i / 2, tile) - lane_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        if (8 * n + i % 2 >= end) s[n][i] = -INFINITY;
      }
    }
  }

  // A higher top for the rows that want one, given the largest scores of a tile's lanes, times
  // scale log2(e); before the first tile also the shift.
  template <Bounds kBounds>
  __device__ __forceinline__ void raise(const float (&most)[2], const float (&t)[kKeys][4],
                                        int tile) {
    float factor[2];
    softmax_.raise(most, Range<T>::kHeadroom, factor);
    if (K::kMoving && tile == 0) set_shift<kBounds>(t);
    outputs_.rescale(factor);
  }

  // Minus the mean of t over the keys that a row sees of the first tile.
  template <Bounds kBounds>
  __device__ __forceinline__ void set_shift(const float (&t)[kKeys][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int count = kBounds == Bounds::kNone ? kBlockN : min(live<kBounds>(r, 0), kBlockN);
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (kBounds == Bounds::kNone || 8 * n + lane_ % 4 * 2 + i < count) {
            total += t[n][2 * r + i];
          }
        }
      }
      t0_[2 * r] = t0_[2 * r + 1] = t0_[2 * r] - row_sum(total) / count;
    }
  }

  // Takes a tile in, or raises the top for it and returns false.
  template <Bounds kBounds>
  __device__ __forceinline__ bool add(int tile) {
    float s[kKeys][4], t[kKeys][4], most[2] = {-INFINITY, -INFINITY};
    const uint32_t k = stage(tile);
    queries_.scores(s, t, t0_, k);
    if (kBounds != Bounds::kNone) bound<kBounds>(s, tile);
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) most[i / 2] = fmaxf(most[i / 2], s[n][i]);
    }
    most[0] *= p_.scale2, most[1] *= p_.scale2;
    if (__any_sync(kAllLanes, softmax_.high<T>(most))) {
      raise<kBounds>(most, t, tile);
      return false;
    }
    uint32_t p[kKeys / 2][4], h[kKeys / 2][4];
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float p0 = exp2_approximate(fmaf(s[n][2 * r], p_.scale2, -softmax_.top[r]));
        const float p1 = exp2_approximate(fmaf(s[n][2 * r + 1], p_.scale2, -softmax_.top[r]));
        softmax_.sum[r] += p0 + p1;
        p[n / 2][n % 2 * 2 + r] = pack<T>(p0, p1);
        if (K::kMoving) {
          float h0 = p0 * p_.scale * t[n][2 * r], h1 = p1 * p_.scale * t[n][2 * r + 1];
          if (kBounds !=
              Bounds::kNone) {  // of a key that is not seen p is 0, and t may be anything
            h0 = p0 == 0.0f ? 0.0f : h0, h1 = p1 == 0.0f ? 0.0f : h1;
          }
          softmax_.mean[r] += h0 + h1;
          h[n / 2][n % 2 * 2 + r] = pack<T>(h0, h1);
        }
      }
    }
    outputs_.add(p, h, k + K::kV);
    return true;
  }

  // The tiles from `tile` to `end`, the last one excluded; a tile that raises the top comes again.
  template <Bounds kBounds>
  __device__ __forceinline__ void pass(int tile, int end) {
    while (tile < end) {
      if (add<kBounds>(tile)) advance(tile++);
    }
  }

  // --- the end ---

  __device__ __forceinline__ void finish() {
    const auto [batch, head, first] = place(p_);
    row_ = first;
    float inverse[2], mean[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float l = row_sum(softmax_.sum[r]), mu = row_sum(softmax_.mean[r]);
      const bool none = l == 0.0f;  // there are no keys, or none with a score above -inf
      // A NaN in h is one in both of the rounded sums, and not to be one in out.
      inverse[r] = none ? 0.0f : 1.0f / (outputs_.sum(r) < INFINITY ? outputs_.sum(r) : l);
      mean[r] = K::kMoving && !none ? outputs_.mean(r) * inverse[r] : 0.0f;
      if (lane_ % 4 == 0 && row(r) < p_.m) {
        const int64_t at = (static_cast<int64_t>(batch) * p_.heads + head) * p_.m + row(r);
        p_.lse[at] = none ? -INFINITY : (softmax_.top[r] + log2f(l)) * 0.6931471805599453f;
        p_.mu[at] = K::kMoving && !none ? mu / l - t0_[2 * r] * p_.scale : 0.0f;
      }
    }
    outputs_.normalize(inverse, mean);
    outputs_.store(rows(p_.out, batch, head), rows(p_.t_out, batch, head), shared_, row_, p_.m);
  }

  const Params& p_;
  const uint32_t shared_;
  const int lane_;
  int row_ = 0, tiles_ = 0;  // the block's first row; tiles of keys
  Rows k_, tk_, v_, tv_;
  Queries<K> queries_;
  DualSoftmax softmax_;
  Outputs<K> outputs_;
  float t0_[4] = {};  // minus the shift, from which products for t start
};

template <class K>
__device__ __forceinline__ void attention_forward(const Params& p) {
  extern __shared__ __align__(128) char shared[];
  Warp<K>(p, shared_address(shared)).run();
}

// --- kernels and their host ---------------------------------------------------------------------

#define SCM_FORWARD SCM_JOIN(attention_forward_d, SCM_HEAD_DIM)

#define SCM_KERNEL(type, T, set, ...)                             \
  extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) \
      SCM_NAME(type, set)(const __grid_constant__ Params p) {     \
    attention_forward<Kind<T, SCM_HEAD_DIM, __VA_ARGS__>>(p);     \
  }
// Every set of tangents: a name, and which of tq, tk, tv it has.
#define SCM_SETS(X, type, T)        \
  X(type, T, qkv, true, true, true) \
  X(type, T, qk, true, true, false) \
  X(type, T, qv, true, false, true) \
  X(type, T, kv, false, true, true) \
  X(type, T, q, true, false, false) \
  X(type, T, k, false, true, false) \
  X(type, T, v, false, false, true) \
  X(type, T, none, false, false, false)

SCM_KERNELS(SCM_KERNEL)

}  // namespace

cudaError_t SCM_JOIN(launch_, SCM_FORWARD)(const AttentionForward& p, Queue& queue) {
  const int64_t blocks = row_tiles(p, kBlockM);
  const Params params = cuda::params(p, kBlockM);
  const auto present = std::make_tuple(bool(p.tq), bool(p.tk), bool(p.tv));
  const Type q = p.q.type;
#define SCM_LAUNCH(type, T, set, ...)                                                         \
  if (q == kTypeOf<T> && present == std::make_tuple(__VA_ARGS__)) {                           \
    return queue.launch(SCM_NAME(type, set), SCM_TEXT(SCM_NAME(type, set)), blocks, kThreads, \
                        Kind<T, SCM_HEAD_DIM, __VA_ARGS__>::kShared, params);                 \
  }
  SCM_KERNELS(SCM_LAUNCH)
  return cudaErrorNotSupported;
}

}  // namespace cuda
}  // namespace scm
