// What the tangent's kernels share: which threads own a sample, its scalars, g a vector at a time,
// and sums over a sample in an order that the shape alone decides.
#pragma once

#include <cmath>
#include <limits>

#include "problems.h"
#include "ptx.cuh"

namespace scm {
namespace cuda {

// Vectors of the most elements that 16 bytes hold, or of one element. A sample, or a part of one,
// is owned by `lanes` threads: 4, 8, 16 or 32 of a warp, or a block.
struct Samples {
  const char* input[4];
  int64_t stride[4];           // of a row, in bytes
  const double* coefficients;  // [b, 4]
  int64_t b, size, part;       // samples; vectors of a sample, and of a part
  unsigned parts, lanes;       // parts of a sample
};

// Vectors of each input that a thread asks for at once.
template <int kVec>
constexpr int kBatch = kVec == 1 ? 4 : 2;

__device__ inline void unpack(unsigned word, float (&g)[1], float) { g[0] = __uint_as_float(word); }
__device__ inline void unpack(unsigned word, float (&g)[2], __nv_bfloat16) {
  g[0] = __uint_as_float(word << 16);
  g[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void unpack(unsigned word, float (&g)[2], __half) {
  g[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  g[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

__device__ inline unsigned pack(const float* g, float) { return __float_as_uint(g[0]); }
template <class T>
__device__ inline unsigned pack(const float* g, T) {
  return pack<T>(g[0], g[1]);
}

// A vector as it comes.
template <class T, int kVec>
using Raw = std::conditional_t<kVec == 1, T, uint4>;

template <class T, int kVec>
__device__ void widen(const Raw<T, kVec>& raw, float (&x)[kVec]) {
  if constexpr (kVec == 1) {
    x[0] = static_cast<float>(raw);
  } else {
    constexpr int kWord = kVec / 4;
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float part[kWord];
      unpack(words[i], part, T{});
#pragma unroll
      for (int j = 0; j < kWord; ++j) x[kWord * i + j] = part[j];
    }
  }
}

template <class T, int kVec>
__device__ void write(char* to, const float (&x)[kVec]) {
  if constexpr (kVec == 1) {
    *reinterpret_cast<T*>(to) = static_cast<T>(x[0]);
  } else {
    constexpr int kWord = kVec / 4;
    *reinterpret_cast<uint4*>(to) = make_uint4(pack(x, T{}), pack(x + kWord, T{}),
                                               pack(x + 2 * kWord, T{}), pack(x + 3 * kWord, T{}));
  }
}

// A thread's share of its sample: vectors first, first + lanes, ... before last.
template <class T, int kVec>
struct Share {
  static constexpr int kBytes = kVec * sizeof(T);

  // All threads of a warp come here, those whose sample lies beyond the last one too.
  __device__ Share(const Samples& p, unsigned block)
      : part(block % p.parts),
        row(int64_t{block / p.parts} * (blockDim.x / p.lanes) + threadIdx.x / p.lanes),
        lane(threadIdx.x % p.lanes),
        lanes(p.lanes),
        live(row < p.b),
        first(part * p.part + lane),
        last(live ? min(p.size, (part + 1) * p.part) : 0),
        before(row * p.size * kBytes) {
    // The 32 bytes of a sample's coefficients are one sector, asked for once: by four threads.
    const double mine = live ? __ldg(p.coefficients + row * 4 + threadIdx.x % 4) : 0.0;
    any = __ballot_sync(kAllLanes, mine != 0.0) >> (threadIdx.x % 32 & ~3u) & 15;
    const float rounded = static_cast<float>(mine);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scalar[i] = __shfl_sync(kAllLanes, rounded, i, 4);
      input[i] = p.input[i] + (live ? row : 0) * p.stride[i];
    }
  }

  // f(j, vector, g) for the vectors `vector`, `vector` + lanes, ... of kBatch that are before
  // `end`, all of which are on their way before the first is used.
  template <class Index, class F>
  __device__ void some(Index vector, Index end, F f) const {
    Raw<T, kVec> raw[kBatch<kVec>][4];
#pragma unroll
    for (int j = 0; j < kBatch<kVec>; ++j) {
      const Index at = vector + static_cast<Index>(j * lanes);
      if (at < end) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          raw[j][i] = __ldg(reinterpret_cast<const Raw<T, kVec>*>(input[i] + int64_t{at} * kBytes));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch<kVec>; ++j) {
      const Index at = vector + static_cast<Index>(j * lanes);
      if (at < end) {
        float g[kVec];
        combine(raw[j], g);
        f(j, at, g);
      }
    }
  }

  // f(vector, g) for all vectors of the share.
  template <class F>
  __device__ void all(F f) const {
    for (int64_t vector = first; vector < last; vector += kBatch<kVec> * lanes) {
      some(vector, last, [&](int, int64_t at, float (&g)[kVec]) { f(at, g); });
    }
  }

  __device__ void combine(const Raw<T, kVec> (&raw)[4], float (&g)[kVec]) const {
    float x[4][kVec];
#pragma unroll
    for (int i = 0; i < 4; ++i) widen<T>(raw[i], x[i]);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      g[j] = scalar[0] * x[0][j];
#pragma unroll
      for (int i = 1; i < 4; ++i) g[j] = fmaf(scalar[i], x[i][j], g[j]);
    }
  }

  int64_t part, row;
  unsigned lane, lanes;
  bool live;
  int64_t first, last;
  int64_t before;  // bytes of an output, before the sample
  bool any;        // a coefficient that is not zero
  float scalar[4];
  const char* input[4];
};

// g of a vector in shared memory, where only its own thread touches it: `slots` vectors, in layers
// of 16 bytes (of an element), so that threads side by side hit all banks.
template <int kVec>
struct Rest {
  static constexpr int kLayer = kVec == 1 ? 1 : 4;

  __device__ float* at(int layer, int slot) const {
    return memory + (layer * slots + slot) * kLayer;
  }

  __device__ void put(int slot, const float (&g)[kVec]) const {
    if constexpr (kVec == 1) {
      *at(0, slot) = g[0];
    } else {
#pragma unroll
      for (int i = 0; i < kVec / 4; ++i) {
        *reinterpret_cast<float4*>(at(i, slot)) =
            make_float4(g[4 * i], g[4 * i + 1], g[4 * i + 2], g[4 * i + 3]);
      }
    }
  }

  __device__ void get(int slot, float (&g)[kVec]) const {
    if constexpr (kVec == 1) {
      g[0] = *at(0, slot);
    } else {
#pragma unroll
      for (int i = 0; i < kVec / 4; ++i) {
        const float4 x = *reinterpret_cast<const float4*>(at(i, slot));
        g[4 * i] = x.x, g[4 * i + 1] = x.y, g[4 * i + 2] = x.z, g[4 * i + 3] = x.w;
      }
    }
  }

  float* memory;
  int slots;
};

template <int kVec>
__device__ double add_squares(const float (&g)[kVec], double sum) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const double wide = g[j];
    sum = fma(wide, wide, sum);
  }
  return sum;
}

// The sum over the threads that own a sample, to each of them. All threads of a block come here,
// and no more than once.
__device__ inline double add_up(double sum, unsigned lanes) {
  for (unsigned offset = min(lanes, 32u) / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  if (lanes <= 32) return sum;
  __shared__ double warps[32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warps[0];
  for (unsigned i = 1; i < lanes / 32; ++i) sum += warps[i];
  return sum;
}

// A sample's sum from those of its parts, by a block.
__device__ inline double add_parts(const double* sums, int64_t row, unsigned parts) {
  double sum = 0.0;
  for (unsigned i = threadIdx.x; i < parts; i += blockDim.x) sum += __ldg(sums + row * parts + i);
  return add_up(sum, blockDim.x);
}

// What normalises samples. `sums` [b, parts], of samples in parts.
struct NormalizeParams {
  NormalizeParams(const TangentNormalize& p, const Samples& samples)
      : samples(samples),
        sums(p.sums),
        out(p.out),
        count(p.options.preset == Preset::kRms ? p.d : 1.0),
        c(p.options.c),
        lost(p.options.zero ? 0.0f : std::numeric_limits<float>::quiet_NaN()) {}

  Samples samples;
  const double* sums;
  char* out;
  double count, c;
  float lost;  // what a sample becomes that is not finite
};

// g / (norm + c), given the sum of g's squares.
struct Scale {
  __device__ Scale(const NormalizeParams& p, double squares)
      : finite(squares < INFINITY),
        factor(static_cast<float>(1.0 / (sqrt(squares / p.count) + p.c))),
        lost(p.lost) {}

  template <class T, int kVec>
  __device__ void write(char* to, float (&g)[kVec]) const {
#pragma unroll
    for (int j = 0; j < kVec; ++j) g[j] = finite ? g[j] * factor : lost;
    cuda::write<T>(to, g);
  }

  bool finite;
  float factor, lost;
};

}  // namespace cuda
}  // namespace scm
