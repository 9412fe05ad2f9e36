// Attention and its tangent in one pass over the keys, for Hopper (sm_90a), bfloat16 and float16.
// The formulas: scm_kernels/attention/reference.py. Compiled once for each head dimension,
// SCM_HEAD_DIM.
//
// A block stays, and takes one tile of 128 rows of a head after the other. It is three warpgroups.
// One copies tiles of k, tk, v and tv into a ring of stages in shared memory, ahead of the others.
// Those have 64 rows each, whose products are those of a warpgroup: their right operands lie in
// shared memory, and they run while the threads do something else. So a warpgroup starts the
// products for out of one tile and those for the scores of the next, and while it waits for them,
// the other one makes p and h of its scores: the two take turns.
//
// The versions, in TFLOP/s of 12 B H M N D operations on an H200, measured in a program around the
// kernel (bfloat16, 1x16x4096x4096, no causal mask, all tangents), each against the kernel as it
// was then:
//
//                                                                      D = 64   72  112  128
//   as it was                                                             529  487  585  626
//   no turns                                                              525  478       590
//   q and tq in shared memory                                             502
//   32 keys a tile                                                                       546
//   pieces of 8 features apart (no swizzle): a row's pieces in one bank   356  375  403  397
//   the same, 16 bytes farther: no copies meet, but products' operands    400  399  426  414
//   nothing copied: the limit of everything else                          578            633
//   no softmax: the limit of copies and products                          649            668

#include <algorithm>
#include <limits>

#include "attention_hopper_worker.cuh"
#include "kernels.h"

namespace scm {
namespace cuda {
namespace {

// Barriers; ones, in even columns and in odd ones; in the tail ones after the features of v, and
// zeros after those of the others.
template <class K>
__device__ __forceinline__ void prepare(uint32_t shared) {
  const int thread = threadIdx.x;
  if (thread < K::kStages) {
    init_barrier(full(shared + K::kBarriers, thread), 128);
    init_barrier(empty(shared + K::kBarriers, thread), 4 * kGroups);
  }
  constexpr uint32_t ones = kOnes<typename K::T>;
  if (thread < 128) {
    store_shared(shared + K::kOnesAt + 4 * thread, ones & (thread < 64 ? 0xffffu : 0xffff0000u));
  }
  using Tile = typename K::Keys;
  for (int i = thread; Tile::kTail && i < K::kStages * K::kN; i += kHopperThreads) {
    for (int from = 0; from < K::kStage; from += Tile::kBytes) {
      const uint32_t x = from == K::kV ? ones : 0u;
      store_shared(shared + i / K::kN * K::kStage + from + Tile::at(i % K::kN, K::kPieces),
                   uint4{x, x, x, x});
    }
  }
  publish();
  __syncthreads();
}

template <class K>
__device__ __forceinline__ void attention_forward(const Params& p) {
  extern __shared__ char dynamic[];
  const uint32_t shared = (shared_address(dynamic) + 1023) / 1024 * 1024;
  prepare<K>(shared);
  const int group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);
  if (group == kGroups) {
    give_registers<40>();
    Copier<K>(p, shared).run();
  } else {
    take_registers<232>();
    Worker<K>(p, shared).run();
  }
}

// --- kernels and their host ---------------------------------------------------------------------

#define SCM_FORWARD SCM_JOIN(attention_forward_hopper_d, SCM_HEAD_DIM)

#define SCM_KERNEL(type, T, set, tkv)                             \
  extern "C" __global__ void __launch_bounds__(kHopperThreads, 1) \
      SCM_NAME(type, set)(const __grid_constant__ Params p) {     \
    attention_forward<HopperKind<T, SCM_HEAD_DIM, tkv>>(p);       \
  }
// The sets of tangents: a name, and whether there are those of keys and values.
#define SCM_SETS(X, type, T) \
  X(type, T, qkv, true)      \
  X(type, T, q, false)

SCM_KERNELS(SCM_KERNEL)

}  // namespace

cudaError_t SCM_JOIN(launch_, SCM_FORWARD)(const AttentionForward& p, int processors,
                                           Queue& queue) {
  const int64_t tiles = row_tiles(p, kHopperRows);
  const Params params = cuda::params(p, kHopperRows);
  if (tiles > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidConfiguration;
  const int64_t blocks = std::min<int64_t>(tiles, processors);
  const Type q = p.q.type;
#define SCM_LAUNCH(type, T, set, tkv)                                                       \
  if (q == kTypeOf<T> && bool(p.tk) == tkv) {                                               \
    return queue.launch(SCM_NAME(type, set), SCM_TEXT(SCM_NAME(type, set)), blocks,         \
                        kHopperThreads, HopperKind<T, SCM_HEAD_DIM, tkv>::kShared, params); \
  }
  SCM_KERNELS(SCM_LAUNCH)
  return cudaErrorNotSupported;
}

}  // namespace cuda
}  // namespace scm
