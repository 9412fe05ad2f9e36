// Attention and its tangent in one pass over the keys, for sm_80 and later, bfloat16 and float16.
// The formulas: scm_kernels/attention/reference.py. Compiled once for each head dimension,
// SCM_HEAD_DIM.
//
// A block is 64 rows of a head, 16 a warp; their q and tq stay in registers. Tiles of 32 keys of k,
// tk, v and tv pass through two stages of shared memory: one is worked on while the other is
// filled. A fragment of k serves q k and tq k, one of v serves p v and h v; none is loaded twice.

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "softmax.cuh"
#include "tile.cuh"

namespace scm {
namespace cuda {
namespace {

constexpr int kD = SCM_HEAD_DIM;
constexpr int kBlocks = 2;  // a multiprocessor
constexpr int kBlockM = 64, kBlockN = 32, kWarps = 4, kThreads = 32 * kWarps;

struct View {
  const char* data;
  int64_t batch, head, row;  // strides in bytes
};

struct Params {
  View q, tq, k, tk, v, tv, out, t_out;
  float *lse, *mu;
  int m, n, heads, group, tiles;  // query heads a key head; tiles of rows a head
  bool causal;
  // The scores are q k times power times rest: a power of two, which goes into q and tq and rounds
  // nothing, and the rest.
  float power, rest;
  float scale2;  // rest * log2(e)
};

// What a block works on: a batch, a head, and the first of its rows.
struct Place {
  int batch, head, row;
};

// Causal rows see more keys the later they are: the last ones first. No place is kept through the
// loops, registers are short there.
__device__ __forceinline__ Place place(const Params& p) {
  const int block = block_again(), head = block / p.tiles;
  return {head / p.heads, head % p.heads, (p.tiles - 1 - block % p.tiles) * kBlockM};
}

__device__ __forceinline__ Rows rows(const View& x, int batch, int head) {
  return {x.data + batch * x.batch + head * x.head, x.row};
}

// What a warp knows and does: T the type of the inputs, and which tangents there are.
template <class T, bool kTQ, bool kTK, bool kTV>
class Warp {
 public:
  static constexpr bool kMoving = kTQ || kTK;  // whether the scores have a tangent
  static constexpr bool kTangent = kMoving || kTV;
  static constexpr int kTensors = 2 + kTK + kTV, kTile = kBlockN * 2 * kD,
                       kStage = kTensors * kTile;
  static constexpr int kQ = kBlockM * 2 * kD;
  // With more features there are no registers for tq, which stays in shared memory.
  static constexpr bool kKeep = kD < 112;
  // What a register less for copies costs is more to compute; where it saves a spill.
  static constexpr bool kLean = kD >= 112 && !(kTQ && kTK && kTV);
  // q, and a tq that does not stay, arrive where the second stage will be; outputs leave from the
  // start.
  static constexpr int kFirst = kStage + (1 + kTQ) * kQ, kLast = (1 + kTangent) * kQ;
  static constexpr int kThen = 2 * kStage + (kTQ && !kKeep ? kQ : 0);
  static constexpr int kShared = kFirst > kThen ? kFirst : kThen;
  static_assert(kLast <= kShared);

  __device__ __forceinline__ Warp(const Params& p, uint32_t shared)
      : p_(p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    const Place at = place(p_);
    row_ = at.row;
    const int last = p_.causal ? min(p_.n, row_ + kBlockM) : p_.n;
    // Tiles that every row sees whole, and all of them.
    const int whole = (p_.causal ? min(p_.n, row_ + 1) : p_.n) / kBlockN;
    tiles_ = (last + kBlockN - 1) / kBlockN;
    start(at.batch, at.head);
    pass<false>(0, whole);
    pass<true>(whole, tiles_);
    finish();
  }

 private:
  using S = Swizzle<kD>;
  static constexpr int kSteps = kD / 16, kGroups = kD / 8, kKeys = kBlockN / 8;
  static constexpr bool kHalf = kD % 16 == 8;  // the last step is half as deep

  // --- copies ---

  __device__ __forceinline__ uint32_t stage(int tile) const {
    return shared_ + (tile % 2) * kStage;
  }

  __device__ __forceinline__ uint32_t tq() const {
    return shared_ + (kKeep ? kStage + kQ : 2 * kStage);
  }

  __device__ __forceinline__ void fetch(int tile) {
    const int first = tile * kBlockN;
    const unsigned thread = kLean ? thread_again() : threadIdx.x;
    uint32_t to = stage(tile);
    copy_tile<kD, kBlockN, kThreads>(to, k_, first, p_.n, thread), to += kTile;
    if (kTK) copy_tile<kD, kBlockN, kThreads>(to, tk_, first, p_.n, thread), to += kTile;
    copy_tile<kD, kBlockN, kThreads>(to, v_, first, p_.n, thread), to += kTile;
    if (kTV) copy_tile<kD, kBlockN, kThreads>(to, tv_, first, p_.n, thread);
  }

  // q and tq to registers; the first tiles on their way, the first one there.
  __device__ __forceinline__ void start(int batch, int head) {
    const int kv = head / p_.group;
    k_ = rows(p_.k, batch, kv), v_ = rows(p_.v, batch, kv);
    if (kTK) tk_ = rows(p_.tk, batch, kv);
    if (kTV) tv_ = rows(p_.tv, batch, kv);
    const uint32_t q = shared_ + kStage;
    copy_tile<kD, kBlockM, kThreads>(q, rows(p_.q, batch, head), row_, p_.m, threadIdx.x);
    if (kTQ)
      copy_tile<kD, kBlockM, kThreads>(tq(), rows(p_.tq, batch, head), row_, p_.m, threadIdx.x);
    commit_copies();
    if (tiles_ > 0) fetch(0);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    load_rows(q_, q_half_, q);
    if (kTQ && kKeep) load_rows(tq_, tq_half_, tq());
    if (kTQ && !kKeep) scale_rows(tq());
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

  // A step of 16 features of this warp's rows.
  __device__ __forceinline__ void load_step(uint32_t (&x)[4], uint32_t tile, int step) const {
    const int row = threadIdx.x / 32 * 16 + lane_ % 16;
    load_matrices<false>(x, tile + S::at(row, 2 * step + lane_ / 16));
  }

  // This warp's rows of tq times power, in place.
  __device__ __forceinline__ void scale_rows(uint32_t tile) const {
    tile += threadIdx.x / 32 * 16 * S::kRowBytes;
#pragma unroll
    for (int i = lane_ * 16; i < 16 * S::kRowBytes; i += 32 * 16) {
      uint4 x = load_shared(tile + i);
      x = {scaled(x.x), scaled(x.y), scaled(x.z), scaled(x.w)};
      store_shared(tile + i, x);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void load_rows(uint32_t (&x)[kSteps][4], uint32_t (&half)[2],
                                            uint32_t tile) const {
    const int row = threadIdx.x / 32 * 16 + lane_ % 16;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load_step(x[step], tile, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[step][i] = scaled(x[step][i]);
    }
    if (kHalf) {
      uint32_t both[4];
      load_matrices<false>(both, tile + S::at(row, kGroups - 1));
      half[0] = scaled(both[0]), half[1] = scaled(both[1]);
    }
  }

  __device__ __forceinline__ uint32_t scaled(uint32_t x) const {
    const float2 y = unpack<T>(x);
    return pack<T>(y.x * p_.power, y.y * p_.power);
  }

  // --- products ---

  // s = q k and t = tq k + q tk + t0, of this warp's rows and a tile's keys; t0 is minus the shift.
  __device__ __forceinline__ void scores(float (&s)[kKeys][4], float (&t)[kKeys][4], uint32_t k) {
    const float none[4] = {};
    const int row = lane_ / 16 * 8 + lane_ % 8, column = lane_ / 8 % 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[kKeys / 2][4], tq[4];
      if (kTQ && !kKeep) load_step(tq, this->tq(), step);
#pragma unroll
      for (int tangent = 0; tangent <= kTK; ++tangent) {
#pragma unroll
        for (int j = 0; j < kKeys / 2; ++j) {
          load_matrices<false>(
              b[j], k + tangent * kTile + j * 16 * S::kRowBytes + S::at(row, 2 * step + column));
        }
#pragma unroll
        for (int n = 0; n < kKeys; ++n) {
          const uint32_t b0 = b[n / 2][n % 2 * 2], b1 = b[n / 2][n % 2 * 2 + 1];
          if (!tangent) product<T>(s[n], q_[step], b0, b1, step == 0 ? none : s[n]);
          if (!tangent && kTQ)
            product<T>(t[n], kKeep ? tq_[step] : tq, b0, b1, step == 0 ? t0_ : t[n]);
          if (tangent) product<T>(t[n], q_[step], b0, b1, step == 0 && !kTQ ? t0_ : t[n]);
        }
      }
    }
    if (kHalf) {
#pragma unroll
      for (int tangent = 0; tangent <= kTK; ++tangent) {
#pragma unroll
        for (int j = 0; j < kKeys; j += 4) {
          uint32_t b[4];
          load_matrices<false>(
              b, k + tangent * kTile + j * 8 * S::kRowBytes + S::at(lane_, kGroups - 1));
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            if (!tangent) product<T>(s[j + n], q_half_, b[n], s[j + n]);
            if (!tangent && kTQ) product<T>(t[j + n], tq_half_, b[n], t[j + n]);
            if (tangent) product<T>(t[j + n], q_half_, b[n], t[j + n]);
          }
        }
      }
    }
  }

  // out += p v and t_out += h v + p tv.
  __device__ __forceinline__ void values(const uint32_t (&p)[kKeys / 2][4],
                                         const uint32_t (&h)[kKeys / 2][4], uint32_t v) {
    const int row = lane_ % 16, column = lane_ / 16;
#pragma unroll
    for (int j = 0; j < kKeys / 2; ++j) {
      // Ones in columns that alternate: the sums of p and of h in one set of accumulators.
      const uint32_t even = lane_ / 4 % 2 == 0 ? kOnes<T> : 0u;
      product<T>(rounded_, p[j], even, even, rounded_);
      if (kMoving) product<T>(rounded_, h[j], even ^ kOnes<T>, even ^ kOnes<T>, rounded_);
#pragma unroll
      for (int g = 0; g < kGroups / 2; ++g) {
        uint32_t b[4];
        load_matrices<true>(b, v + j * 16 * S::kRowBytes + S::at(row, 2 * g + column));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          product<T>(out_[2 * g + i], p[j], b[2 * i], b[2 * i + 1], out_[2 * g + i]);
          if (kMoving)
            product<T>(t_out_[2 * g + i], h[j], b[2 * i], b[2 * i + 1], t_out_[2 * g + i]);
        }
        if (kTV) {
          load_matrices<true>(b, v + kTile + j * 16 * S::kRowBytes + S::at(row, 2 * g + column));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            product<T>(t_out_[2 * g + i], p[j], b[2 * i], b[2 * i + 1], t_out_[2 * g + i]);
          }
        }
      }
    }
    if (kHalf) {
      constexpr int g = kGroups - 1;
#pragma unroll
      for (int j = 0; j < kKeys / 2; j += 2) {
        uint32_t b[4];
        load_matrices<true>(b, v + j * 16 * S::kRowBytes + S::at(lane_, g));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          product<T>(out_[g], p[j + i], b[2 * i], b[2 * i + 1], out_[g]);
          if (kMoving) product<T>(t_out_[g], h[j + i], b[2 * i], b[2 * i + 1], t_out_[g]);
        }
        if (kTV) {
          load_matrices<true>(b, v + kTile + j * 16 * S::kRowBytes + S::at(lane_, g));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            product<T>(t_out_[g], p[j + i], b[2 * i], b[2 * i + 1], t_out_[g]);
          }
        }
      }
    }
  }

  // --- softmax ---

  // The row of the block's 64 that this thread has: r = 0 and 1.
  __device__ __forceinline__ int row(int r) const {
    return row_ + threadIdx.x / 32 * 16 + 8 * r + lane_ / 4;
  }

  // Keys that a row sees, from the first of a tile on.
  __device__ __forceinline__ int live(int r, int tile) const {
    return (p_.causal ? min(p_.n, row(r) + 1) : p_.n) - tile * kBlockN;
  }

  // -inf for the keys that a row does not see.
  __device__ __forceinline__ void bound(float (&s)[kKeys][4], int tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int end = live(i / 2, tile) - lane_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        if (8 * n + i % 2 >= end) s[n][i] = -INFINITY;
      }
    }
  }

  // A higher top for the rows that want one, given the scores of a tile and its lanes' largest ones
  // times scale log2(e); before the first tile also the shift.
  template <bool kBounded>
  __device__ __forceinline__ void raise(const float (&most)[2], const float (&t)[kKeys][4],
                                        int tile) {
    float factor[2];
    softmax_.raise(most, Range<T>::kHeadroom, factor);
    if (kMoving && tile == 0) set_shift<kBounded>(t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        out_[g][i] *= factor[i / 2];
        if (kTangent) t_out_[g][i] *= factor[i / 2];
      }
      // Of l and mu in columns that alternate; a lane's are of one row and of the one 8 below.
      rounded_[i] *= factor[i / 2];
    }
  }

  // Minus the mean of t over the keys that a row sees of the first tile.
  template <bool kBounded>
  __device__ __forceinline__ void set_shift(const float (&t)[kKeys][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int count = kBounded ? min(live(r, 0), kBlockN) : kBlockN;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!kBounded || 8 * n + lane_ % 4 * 2 + i < count) total += t[n][2 * r + i];
        }
      }
      t0_[2 * r] = t0_[2 * r + 1] = t0_[2 * r] - row_sum(total) / count;
    }
  }

  // Takes a tile in, or raises the top for it and returns false.
  template <bool kBounded>
  __device__ __forceinline__ bool add(int tile) {
    float s[kKeys][4], t[kKeys][4], most[2] = {-INFINITY, -INFINITY};
    const uint32_t k = stage(tile);
    scores(s, t, k);
    if (kBounded) bound(s, tile);
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) most[i / 2] = fmaxf(most[i / 2], s[n][i]);
    }
    most[0] *= p_.scale2, most[1] *= p_.scale2;
    if (__any_sync(kAllLanes, softmax_.high<T>(most))) {
      raise<kBounded>(most, t, tile);
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
        if (kMoving) {
          const float h0 = p0 * p_.rest * t[n][2 * r], h1 = p1 * p_.rest * t[n][2 * r + 1];
          softmax_.mean[r] += h0 + h1;
          h[n / 2][n % 2 * 2 + r] = pack<T>(h0, h1);
        }
      }
    }
    values(p, h, k + (1 + kTK) * kTile);
    return true;
  }

  // The tiles from `tile` to `end`, the last one excluded; a tile that raises the top comes again.
  template <bool kBounded>
  __device__ __forceinline__ void pass(int tile, int end) {
    while (tile < end) {
      if (add<kBounded>(tile)) advance(tile++);
    }
  }

  // --- the end ---

  __device__ __forceinline__ void finish() {
    const auto [batch, head, first] = place(p_);
    row_ = first;
    float scale[2], mean[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float l = row_sum(softmax_.sum[r]), mu = row_sum(softmax_.mean[r]);
      const bool none = l == 0.0f;  // there are no keys
      scale[r] = none ? 0.0f : 1.0f / rounded_[2 * r];
      mean[r] = kMoving && !none ? rounded_[2 * r + 1] * scale[r] : 0.0f;
      if (lane_ % 4 == 0 && row(r) < p_.m) {
        const int64_t at = (static_cast<int64_t>(batch) * p_.heads + head) * p_.m + row(r);
        p_.lse[at] = none ? -INFINITY : (softmax_.top[r] + log2f(l)) * 0.6931471805599453f;
        p_.mu[at] = none || !kMoving ? 0.0f : mu / l - t0_[2 * r] * p_.rest;
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out_[g][i] *= scale[i / 2];
        if (kTangent) t_out_[g][i] = t_out_[g][i] * scale[i / 2] - mean[i / 2] * out_[g][i];
      }
    }
    store(p_.out, out_, shared_, batch, head);
    store(p_.t_out, t_out_, shared_ + (kTangent ? kQ : 0), batch, head);
  }

  // Through shared memory, so that rows are written in pieces of 16 bytes.
  __device__ __forceinline__ void store(const View& to, const float (&x)[kGroups][4],
                                        uint32_t shared, int batch, int head) {
    const int first = threadIdx.x / 32 * 16;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t at = shared + S::at(first + 8 * r + lane_ / 4, g) + lane_ % 4 * 4;
        const uint32_t both = pack<T>(x[g][2 * r], x[g][2 * r + 1]);
        store_shared(at, both);
      }
    }
    __syncwarp();
    char* data = const_cast<char*>(to.data) + batch * to.batch + head * to.head;
#pragma unroll
    for (int i = 0; i < (16 * kGroups + 31) / 32; ++i) {
      const int at = 32 * i + lane_, line = first + at / kGroups, piece = at % kGroups;
      if (at < 16 * kGroups && row_ + line < p_.m) {
        *reinterpret_cast<uint4*>(data + (row_ + line) * to.row + piece * 16) =
            load_shared(shared + S::at(line, piece));
      }
    }
    __syncwarp();
  }

  const Params& p_;
  const uint32_t shared_;
  const int lane_;
  int row_ = 0, tiles_ = 0;  // the block's first row; tiles of keys
  Rows k_, tk_, v_, tv_;
  uint32_t q_[kSteps][4], tq_[kSteps][4], q_half_[2], tq_half_[2];
  DualSoftmax softmax_;
  float out_[kGroups][4] = {}, t_out_[kGroups][4] = {};
  float rounded_[4] = {};  // sums of p and h as rounded: l and mu of row 0, of row 1
  float t0_[4] = {};       // minus the shift, as the products start from it
};

template <class T, bool kTQ, bool kTK, bool kTV>
__device__ __forceinline__ void attention_forward(const Params& p) {
  extern __shared__ __align__(128) char shared[];
  Warp<T, kTQ, kTK, kTV>(p, shared_address(shared)).run();
}

// --- kernels and their host ---------------------------------------------------------------------

#define SCM_JOIN_(a, b) a##b
#define SCM_JOIN(a, b) SCM_JOIN_(a, b)
#define SCM_TEXT_(x) #x
#define SCM_TEXT(x) SCM_TEXT_(x)
#define SCM_FORWARD SCM_JOIN(attention_forward_d, SCM_HEAD_DIM)
// attention_forward_d64_bf16_qkv_kernel: the head dimension, the type, the tangents there are.
#define SCM_NAME(type, set) SCM_JOIN(SCM_FORWARD, _##type##_##set##_kernel)

#define SCM_KERNEL(type, T, set, ...)                             \
  extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) \
      SCM_NAME(type, set)(const __grid_constant__ Params p) {     \
    attention_forward<T, __VA_ARGS__>(p);                         \
  }
#define SCM_KERNELS(type, T)                 \
  SCM_KERNEL(type, T, qkv, true, true, true) \
  SCM_KERNEL(type, T, q, true, false, false) \
  SCM_KERNEL(type, T, kv, false, true, true) \
  SCM_KERNEL(type, T, none, false, false, false)

SCM_KERNELS(bf16, __nv_bfloat16)
SCM_KERNELS(f16, __half)

View view(const Tensor& x) { return {x.data, 2 * x.stride[0], 2 * x.stride[1], 2 * x.stride[2]}; }

// scale = power * rest. A power of two between 2^-8 and 1, times the sign, rounds no bfloat16 and
// no float16 but for denormals.
void split(float scale, Params& params) {
  const int exponent = scale == 0.0f ? 0 : std::min(std::max(std::ilogb(scale), -8), 0);
  params.power = scale == 0.0f ? 0.0f : std::copysign(std::ldexp(1.0f, exponent), scale);
  params.rest = scale == 0.0f ? 1.0f : scale / params.power;
  params.scale2 = static_cast<float>(params.rest * 1.4426950408889634);
}

}  // namespace

cudaError_t SCM_JOIN(launch_, SCM_FORWARD)(const AttentionForward& p, Queue& queue) {
  Params params{};
  params.q = view(p.q), params.k = view(p.k), params.v = view(p.v);
  params.tq = view(p.tq), params.tk = view(p.tk), params.tv = view(p.tv);
  params.out = view(p.out), params.t_out = view(p.t_out), params.lse = p.lse, params.mu = p.mu;
  params.m = static_cast<int>(p.m), params.n = static_cast<int>(p.n), params.causal = p.causal;
  params.heads = static_cast<int>(p.h), params.group = static_cast<int>(p.h / p.hk);
  params.tiles = (params.m + kBlockM - 1) / kBlockM;
  split(p.scale, params);
  const int64_t blocks = params.tiles * p.h * p.b;

#define SCM_LAUNCH(type, T, set, ...)                                                       \
  return queue.launch(SCM_NAME(type, set), SCM_TEXT(SCM_NAME(type, set)), blocks, kThreads, \
                      Warp<T, __VA_ARGS__>::kShared, params)
#define SCM_LAUNCH_SET(type, T)                                  \
  if (q && k && v) SCM_LAUNCH(type, T, qkv, true, true, true);   \
  if (q && !k && !v) SCM_LAUNCH(type, T, q, true, false, false); \
  if (!q && k && v) SCM_LAUNCH(type, T, kv, false, true, true);  \
  if (!q && !k && !v) SCM_LAUNCH(type, T, none, false, false, false)

  const bool q(p.tq), k(p.tk), v(p.tv);
  if (p.q.type == Type::kBFloat16) {
    SCM_LAUNCH_SET(bf16, __nv_bfloat16);
  } else if (p.q.type == Type::kFloat16) {
    SCM_LAUNCH_SET(f16, __half);
  }
  return cudaErrorNotSupported;
}

}  // namespace cuda
}  // namespace scm
