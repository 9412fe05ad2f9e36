// How the backward of attention is cut into jobs, and where they keep their sums over the queries.
#pragma once

#include "attention_tiles.h"

namespace scm {
namespace SCM_ISA {
namespace {

constexpr int64_t kRows = 64;  // queries a tile

// Each part of the queries has sums of its own over all keys. On many threads, that is no more than
// this many floats, 64 MiB, or the sums of this many parts: it does not grow with M N.
constexpr int64_t kMostFloats = 1 << 24, kFewParts = 4;

// Sums over the queries, of one part of one (batch, key head): [n, width] each, or absent.
struct KeySums {
  float *dk, *dtk, *dv, *dtv;
};

// How the work is cut. A gradient of a mask that is shared by batches or heads keeps those in one
// job, one after the other, and one that is shared by queries keeps all of those.
struct Plan {
  int64_t batches, heads;  // that one job goes over
  int64_t parts;           // of the queries
  int64_t tiles;           // of queries
  int64_t d, e;            // rounded up to whole vectors
  int64_t part_floats;     // of one KeySums

  explicit Plan(const AttentionBackward& p) {
    const auto shared = [&p](int dim) {
      return (p.dmask && p.dmask.stride[dim] == 0) || (p.dtmask && p.dtmask.stride[dim] == 0);
    };
    batches = shared(0) ? p.b : 1;
    heads = shared(1) ? p.hk : 1;
    tiles = (p.m + kRows - 1) / kRows;
    const int64_t jobs = p.b / batches * (p.hk / heads), wanted = 4 * p.threads;
    d = round_up(p.d, kLanes), e = round_up(p.e, kLanes);
    part_floats = p.n * (d * (bool(p.dk) + bool(p.dtk)) + e * (bool(p.dv) + bool(p.dtv)));
    parts = 1;
    if (p.threads == 1 || jobs >= wanted || shared(2)) return;
    const int64_t floats = p.b * p.hk * part_floats;
    const int64_t room = floats > 0 ? kMostFloats / floats : tiles;
    parts = least(least((wanted + jobs - 1) / jobs, tiles), room > kFewParts ? room : kFewParts);
  }

  int64_t jobs(const AttentionBackward& p) const { return p.b / batches * (p.hk / heads) * parts; }

  // Where the sums of a part lie in the workspace, `part_floats` of them.
  float* place(const AttentionBackward& p, float* workspace, int64_t b, int64_t hk,
               int64_t part) const {
    return workspace + ((b * p.hk + hk) * parts + part) * part_floats;
  }

  KeySums sums(const AttentionBackward& p, float* next) const {
    const auto take = [&](const Tensor& x, int64_t width) {
      float* piece = x ? next : nullptr;
      next += x ? p.n * width : 0;
      return piece;
    };
    KeySums s;
    s.dk = take(p.dk, d), s.dtk = take(p.dtk, d), s.dv = take(p.dv, e), s.dtv = take(p.dtv, e);
    return s;
  }
};

// Rows of a gradient from the parts of its sum, [n, width] each and `stride` apart, in order.
void store_sum(const Matrix& to, int64_t n, int64_t features, const float* part, int64_t parts,
               int64_t stride, int64_t width, float factor) {
  const int64_t size = size_of(to.type);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < features; j += kLanes) {
      VecF sum = load<VecF>(part + i * width + j);
      for (int64_t k = 1; k < parts; ++k) sum += load<VecF>(part + k * stride + i * width + j);
      char* at = to.at(i) + j * to.column;
      if (j + kLanes <= features && to.column == size) {
        store_from_float(at, to.type, sum * factor);
      } else {
        store_some_from_float(at, to.type, sum * factor, least<int64_t>(kLanes, features - j),
                              to.column / size);
      }
    }
  }
}

void store_sums(const AttentionBackward& p, const Plan& plan, float* workspace, int64_t b,
                int64_t hk) {
  const KeySums s = plan.sums(p, plan.place(p, workspace, b, hk, 0));
  const auto put = [&](const Tensor& to, const float* from, int64_t features, float factor) {
    if (!to) return;
    store_sum(matrix(to, b, hk), p.n, features, from, plan.parts, plan.part_floats,
              round_up(features, kLanes), factor);
  };
  put(p.dk, s.dk, p.d, p.scale), put(p.dtk, s.dtk, p.d, p.scale);
  put(p.dv, s.dv, p.e, 1.0f), put(p.dtv, s.dtv, p.e, 1.0f);
}

}  // namespace
}  // namespace SCM_ISA
}  // namespace scm
