// What is fixed when a kernel of attention for Hopper is compiled: the type of the inputs, the head
// dimension, whether keys and values have tangents; and what follows for the tiles, and for shared
// memory.
#pragma once

#include "hopper.cuh"

namespace scm {
namespace cuda {

// kRows rows of kD elements in shared memory, as operands of a warpgroup's products. Pieces of 16
// bytes lie in regions of 64 columns, swizzled, so that neither the eight pieces of a row that are
// copied together, nor the eight rows of a piece that a product reads, meet in a bank. With 72
// columns the last 8 have a region of 16.
template <int kD, int kRows>
struct WideTile {
  static constexpr int kTail = kD % 16 / 8, kRegions = (kD - 8 * kTail + 63) / 64;
  static constexpr int kRegion = kRows * 128;  // bytes
  static constexpr int kBytes = kRegions * kRegion + kTail * kRows * 32;
  static_assert(!kTail || kD == 64 * kRegions + 8);

  // Bytes from the start of the tile to 8 columns of a row.
  static __device__ __forceinline__ int at(int row, int piece) {
    if (piece < 8 * kRegions) {
      return piece / 8 * kRegion + row * 128 + (piece % 8 ^ row % 8) * 16;
    }
    return kRegions * kRegion + row * 32 + ((piece - 8 * kRegions) ^ row / 4 % 2) * 16;
  }

  // An operand of 16 columns of all rows, from column 16 * step on.
  static __device__ __forceinline__ uint64_t columns(uint32_t tile, int step) {
    if (step < 4 * kRegions) {
      return operand(tile + step / 4 * kRegion + step % 4 * 32, Swizzling::k128, 1024);
    }
    return operand(tile + kRegions * kRegion, Swizzling::k32, 256);
  }

  // An operand of all columns, but for the tail, of 16 rows; and of the tail's 16.
  static __device__ __forceinline__ uint64_t lines(uint32_t tile, int step) {
    return operand(tile + step * 16 * 128, Swizzling::k128, 1024, kRegion);
  }
  static __device__ __forceinline__ uint64_t tail_lines(uint32_t tile, int step) {
    return operand(tile + kRegions * kRegion + step * 16 * 32, Swizzling::k32, 256);
  }
};

// A block: kGroups warpgroups, each with rows of its own, and one that copies.
constexpr int kGroups = 2, kGroupRows = 64, kHopperRows = kGroups * kGroupRows;
constexpr int kHopperThreads = (kGroups + 1) * 128;

template <class Type, int kFeatures, bool kKeyTangents>
struct HopperKind {
  using T = Type;
  static constexpr int kD = kFeatures, kPieces = kD / 8, kSteps = (kD + 15) / 16;
  static constexpr bool kTKV = kKeyTangents;  // tk and tv; tq there always is

  // Keys of a tile: what registers allow.
  static constexpr int kN = kD <= 72 ? 64 : 48;
  static constexpr int kStages = kD <= 72 ? 4 : 3;
  // Where registers allow it, q and tq stay in them; else in shared memory.
  static constexpr bool kKeepQ = kD == 64;

  // Bytes of shared memory: stages of k, tk, v, tv, in this order; q and tq of each warpgroup;
  // ones; two barriers a stage. All start at multiples of 1024 bytes but the last.
  using Keys = WideTile<kD, kN>;
  using Queries = WideTile<kD, kGroupRows>;
  static constexpr int kV = (1 + kTKV) * Keys::kBytes, kStage = 2 * kV;
  static constexpr int kQ = kKeepQ ? 0 : Queries::kBytes;
  static constexpr int kQueries = kStages * kStage, kOnesAt = kQueries + kGroups * 2 * kQ;
  static constexpr int kBarriers = kOnesAt + 512;
  static constexpr int kShared = kBarriers + 2 * kStages * 8 + 1024;  // the start is rounded up
  static_assert(Keys::kBytes % 1024 == 0 && Queries::kBytes % 1024 == 0 && kShared <= 232448);
};

}  // namespace cuda
}  // namespace scm
