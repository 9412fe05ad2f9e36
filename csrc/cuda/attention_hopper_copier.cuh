// What the warpgroups of a Hopper kernel of attention agree on, and the one that copies keys.
#pragma once

#include "attention_hopper_kind.cuh"
#include "attention_params.cuh"

namespace scm {
namespace cuda {

// A stage is full when all 128 threads of the warpgroup that copies have arrived, and empty when
// all warps have that work on it.
__device__ __forceinline__ uint32_t full(uint32_t barriers, int stage) {
  return barriers + 16 * stage;
}

__device__ __forceinline__ uint32_t empty(uint32_t barriers, int stage) {
  return barriers + 16 * stage + 8;
}

// The stage of a tile, and the parity of its barriers' phase.
template <int kStages>
struct Ring {
  int stage = 0, phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// Tiles of rows of 16 heads, which find each other's keys in the cache, are in one order: causal
// rows see more keys the later they are, so the last ones come first.
__device__ __forceinline__ Place place(const Params& p, int tile) {
  const int heads = p.blocks / p.tiles, before = tile / (16 * p.tiles) * 16;
  const int together = min(16, heads - before), at = tile - before * p.tiles;
  const int head = before + at % together;
  return {head / p.heads, head % p.heads, (p.tiles - 1 - at / together) * kHopperRows};
}

// The tile that this block works on in a round, the direction changing from round to round, so that
// all blocks have about the same number of keys; or one that is not there.
__device__ __forceinline__ int assigned(int round) {
  const int block = block_again(), all = gridDim.x;
  return round * all + (round % 2 == 0 ? block : all - 1 - block);
}

// Tiles of keys that any of a tile's rows sees.
template <class K>
__device__ __forceinline__ int key_tiles(const Params& p, int row) {
  const int last = p.causal ? min(p.n, row + kHopperRows) : p.n;
  return (last + K::kN - 1) / K::kN;
}

template <class K>
class Copier {
 public:
  __device__ __forceinline__ Copier(const Params& p, uint32_t shared)
      : p_(p), shared_(shared), thread_(threadIdx.x % 128) {}

  __device__ __forceinline__ void run() {
    for (int round = 0; round * int(gridDim.x) < p_.blocks; ++round) {
      const int tile = assigned(round);
      if (tile < p_.blocks) copy_keys(place(p_, tile));
    }
    commit_copies();
    wait_for_copies<0>();
  }

 private:
  __device__ __forceinline__ void copy_keys(const Place& at) {
    const int kv = at.head / p_.group, tiles = key_tiles<K>(p_, at.row);
    const char* k = rows(p_.k, at.batch, kv).data;
    const char* tk = rows(p_.tk, at.batch, kv).data;
    const char* v = rows(p_.v, at.batch, kv).data;
    const char* tv = rows(p_.tv, at.batch, kv).data;
    for (int tile = 0; tile < tiles; ++tile) {
      wait(empty(shared_ + K::kBarriers, ring_.stage), ring_.phase ^ 1);
      uint32_t to = shared_ + ring_.stage * K::kStage;
      copy(to, k, p_.k.row, tile), to += Tile::kBytes;
      if (K::kTKV) copy(to, tk, p_.tk.row, tile), to += Tile::kBytes;
      copy(to, v, p_.v.row, tile), to += Tile::kBytes;
      if (K::kTKV) copy(to, tv, p_.tv.row, tile);
      arrive_with_copies(full(shared_ + K::kBarriers, ring_.stage));
      ring_.advance();
    }
  }

  // Eight neighbours copy 128 bytes of a row; rows past the last are zeros. There are 40 registers:
  // addresses are made anew for every tile.
  __device__ __forceinline__ void copy(uint32_t to, const char* from, int stride, int tile) const {
    const int line = thread_ / 8, column = thread_ % 8;
    int first = tile * K::kN;
    asm volatile("" : "+r"(first));
#pragma unroll
    for (int next = 0; next < K::kN; next += 16) {
      const int row = first + line + next;
      const char* x = from + static_cast<int64_t>(row) * stride + column * 16;
#pragma unroll
      for (int piece = 0; piece < 8 * Tile::kRegions; piece += 8) {
        if (piece + 8 <= K::kPieces || piece + column < K::kPieces) {
          copy16(to + Tile::at(line, column) + piece / 8 * Tile::kRegion + next * 128,
                 x + piece * 16, row < p_.n);
        }
      }
    }
    if (Tile::kTail && thread_ < K::kN) {
      const int row = first + thread_;
      copy16(to + Tile::at(thread_, K::kPieces - 1),
             from + static_cast<int64_t>(row) * stride + (K::kPieces - 1) * 16, row < p_.n);
    }
  }

  using Tile = typename K::Keys;

  const Params& p_;
  const uint32_t shared_;
  const int thread_;
  Ring<K::kStages> ring_;
};

}  // namespace cuda
}  // namespace scm
