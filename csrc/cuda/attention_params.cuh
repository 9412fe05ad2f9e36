// What the kernels of attention's forward are given, and how a file names and finds those that it
// compiles: SCM_FORWARD begins their names, SCM_SETS(X, type, T) are the sets of tangents of a
// type.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "problems.h"
#include "tile.cuh"

namespace scm {
namespace cuda {

struct View {
  char* data;
  int64_t batch, head, row;  // strides in bytes
};

struct Params {
  View q, tq, k, tk, v, tv, out, t_out;
  float *lse, *mu;
  int m, n, heads, group;  // query heads a key head
  int tiles, blocks;       // tiles of rows a head; and of all heads and batches
  bool causal;
  float scale, scale2;  // of the scores, without its sign; the same times log2(e)
  uint32_t flip;        // the sign of scale, which goes into q and tq: bits of two numbers
};

// What is worked on: a batch, a head, and the first of its rows.
struct Place {
  int batch, head, row;
};

__device__ __forceinline__ Rows rows(const View& x, int batch, int head) {
  return {x.data + batch * x.batch + head * x.head, x.row};
}

// The stride of a single row means nothing; but rows past the last, of which nothing is read, have
// addresses too, and those are multiples of 16 bytes as all others.
inline View view(const Tensor& x, int64_t rows) {
  return {x.data, 2 * x.stride[0], 2 * x.stride[1], rows > 1 ? 2 * x.stride[2] : 0};
}

// Tiles of `rows` rows, of all heads and batches.
inline int64_t row_tiles(const AttentionForward& p, int rows) {
  return (p.m + rows - 1) / rows * p.h * p.b;
}

inline Params params(const AttentionForward& p, int rows) {
  Params params{};
  params.q = view(p.q, p.m), params.k = view(p.k, p.n), params.v = view(p.v, p.n);
  params.tq = view(p.tq, p.m), params.tk = view(p.tk, p.n), params.tv = view(p.tv, p.n);
  params.out = view(p.out, p.m), params.t_out = view(p.t_out, p.m);
  params.lse = p.lse, params.mu = p.mu;
  params.m = static_cast<int>(p.m), params.n = static_cast<int>(p.n), params.causal = p.causal;
  params.heads = static_cast<int>(p.h), params.group = static_cast<int>(p.h / p.hk);
  params.tiles = (params.m + rows - 1) / rows;
  params.scale = std::abs(p.scale);
  // Above 0, so that it keeps the -inf of keys that are not seen.
  params.scale2 = std::max(static_cast<float>(params.scale * 1.4426950408889634), FLT_MIN);
  params.flip = std::signbit(p.scale) ? 0x80008000u : 0u;
  params.blocks = static_cast<int>(row_tiles(p, rows));
  return params;
}

template <class T>
constexpr Type kTypeOf = std::is_same_v<T, __half> ? Type::kFloat16 : Type::kBFloat16;

#define SCM_JOIN_(a, b) a##b
#define SCM_JOIN(a, b) SCM_JOIN_(a, b)
#define SCM_TEXT_(x) #x
#define SCM_TEXT(x) SCM_TEXT_(x)
// attention_forward_d64_bf16_qkv_kernel: the head dimension, the type, the tangents there are.
#define SCM_NAME(type, set) SCM_JOIN(SCM_FORWARD, _##type##_##set##_kernel)
// Every type and set.
#define SCM_KERNELS(X) SCM_SETS(X, bf16, __nv_bfloat16) SCM_SETS(X, f16, __half)

}  // namespace cuda
}  // namespace scm
