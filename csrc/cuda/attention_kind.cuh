// What is fixed when a kernel of attention is compiled: the type of the inputs, the head dimension,
// which tangents there are; and what follows for the tiles and for shared memory.
#pragma once

#include "tile.cuh"

namespace scm {
namespace cuda {

constexpr int kBlockM = 64, kBlockN = 32;  // rows and keys of a tile
constexpr int kWarpM = 16;                 // rows of a warp
constexpr int kThreads = kBlockM / kWarpM * 32;
constexpr int kKeys = kBlockN / 8;  // products' columns are 8 keys

template <class Type, int kFeatures, bool kTQ_, bool kTK_, bool kTV_>
struct Kind {
  using T = Type;
  static constexpr int kD = kFeatures;
  static constexpr bool kTQ = kTQ_, kTK = kTK_, kTV = kTV_;
  static constexpr bool kMoving = kTQ || kTK;  // whether the scores have a tangent
  static constexpr bool kTangent = kMoving || kTV;

  // Products take 16 features at a time; 8 may be left, for one of half the depth.
  static constexpr int kSteps = kD / 16, kGroups = kD / 8;
  static constexpr bool kHalf = kD % 16 == 8;

  // With more features there are no registers for tq, which stays in shared memory.
  static constexpr bool kKeepTQ = kD < 112;
  // Copies start from the thread's number, read anew so that nothing of it is kept in registers.
  // With 128 features ptxas spills 8 to 24 bytes then, and none without.
  static constexpr bool kAnew = kD < 128;

  // Bytes of shared memory: a stage has a tile of k, tk, v, tv, in this order. q, and a tq that
  // does not stay, arrive where the second stage will be; outputs leave from the start.
  static constexpr int kTile = kBlockN * 2 * kD, kRows = kBlockM * 2 * kD;
  static constexpr int kV = (1 + kTK) * kTile, kStage = kV + (1 + kTV) * kTile;
  static constexpr int kFirst = kStage + (1 + kTQ) * kRows;
  static constexpr int kThen = 2 * kStage + (kTQ && !kKeepTQ ? kRows : 0);
  static constexpr int kShared = kFirst > kThen ? kFirst : kThen;
  static_assert((1 + kTangent) * kRows <= kShared);
};

}  // namespace cuda
}  // namespace scm
