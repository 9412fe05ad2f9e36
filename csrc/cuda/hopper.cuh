// The instructions of Hopper GPUs (sm_90a) that C++ has no word for, each as a function: barriers
// in shared memory, registers that move between warps, and products of a warpgroup, four warps at
// once. PTX ISA 9.7.
#pragma once

#include "ptx.cuh"

namespace scm {
namespace cuda {

// --- barriers in shared memory ------------------------------------------------------------------

// A phase ends when `count` threads have arrived.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// This thread arrives when all of its copies up to now are done.
__device__ __forceinline__ void arrive_with_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Wait for the end of a phase of this parity.
__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Named barriers: wait for `threads` threads of the block, or arrive and go on.
__device__ __forceinline__ void sync_threads(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_threads(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// --- registers of a warpgroup -------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- products of a warpgroup --------------------------------------------------------------------

// Products read shared memory past its other users: what those have written is to be seen.
__device__ __forceinline__ void publish() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Products may use registers as they are now.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products of this warpgroup since the last commit are a group.
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most kPending groups of this warpgroup are on their way.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Nothing that reads or writes x is moved over this place by the compiler.
template <int N>
__device__ __forceinline__ void settle(float (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(x[i][j])::"memory");
  }
}

// How the rows of an operand lie in shared memory: 128, 32, or 16 bytes each, pieces of 16 bytes
// exchanged within 8 rows as the name says.
enum class Swizzling : uint64_t { kNone = 0, k128 = 1, k32 = 3 };

// An operand in shared memory. `next` bytes lead from 8 rows to the next 8; `aside` to the columns
// after those of a row, where an operand has more.
__device__ __forceinline__ uint64_t operand(uint32_t at, Swizzling swizzling, uint32_t next,
                                            uint32_t aside = 16) {
  return static_cast<uint64_t>((at & 0x3ffff) >> 4) | static_cast<uint64_t>(aside >> 4) << 16 |
         static_cast<uint64_t>(next >> 4) << 32 | static_cast<uint64_t>(swizzling) << 62;
}

// The registers of d, of 8 N columns, as the instruction names them and as C++ does.
#define SCM_D1 "%0, %1, %2, %3"
#define SCM_D2 SCM_D1 ", %4, %5, %6, %7"
#define SCM_D6 \
  SCM_D2 ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define SCM_D8 SCM_D6 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SCM_D12 \
  SCM_D8 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SCM_D14 SCM_D12 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SCM_D16 SCM_D14 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SCM_E(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SCM_E1 SCM_E(0)
#define SCM_E2 SCM_E1, SCM_E(1)
#define SCM_E6 SCM_E2, SCM_E(2), SCM_E(3), SCM_E(4), SCM_E(5)
#define SCM_E8 SCM_E6, SCM_E(6), SCM_E(7)
#define SCM_E12 SCM_E8, SCM_E(8), SCM_E(9), SCM_E(10), SCM_E(11)
#define SCM_E14 SCM_E12, SCM_E(12), SCM_E(13)
#define SCM_E16 SCM_E14, SCM_E(14), SCM_E(15)

// d += a b, or d = a b: a [64, 16], 16 rows a warp, and b [16, 8 N]. Of d a lane has what it has of
// those of `product`, 8 columns at a time. If b lies by columns, its rows are 16 of a tile's rows;
// else they are 16 of a tile's columns, as those of a are.
template <class T, bool kByColumns, int N>
__device__ __forceinline__ void product(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b,
                                        bool add) {
#define SCM_PRODUCT(type, n, list, outputs, a0, a1, a2, a3, b0, add0, by0)                  \
  asm volatile(                                                                             \
      "{\n"                                                                                 \
      ".reg .pred add;\n"                                                                   \
      "setp.ne.b32 add, %" #add0                                                            \
      ", 0;\n"                                                                              \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list "}, {%" #a0 \
      ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", add, 1, 1, %" #by0                        \
      ";\n"                                                                                 \
      "}"                                                                                   \
      : outputs                                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kByColumns)))
#define SCM_PRODUCTS(type)                                                                     \
  if constexpr (N == 1) SCM_PRODUCT(type, 8, SCM_D1, SCM_E1, 4, 5, 6, 7, 8, 9, 10);            \
  if constexpr (N == 2) SCM_PRODUCT(type, 16, SCM_D2, SCM_E2, 8, 9, 10, 11, 12, 13, 14);       \
  if constexpr (N == 8) SCM_PRODUCT(type, 64, SCM_D8, SCM_E8, 32, 33, 34, 35, 36, 37, 38);     \
  if constexpr (N == 12) SCM_PRODUCT(type, 96, SCM_D12, SCM_E12, 48, 49, 50, 51, 52, 53, 54);  \
  if constexpr (N == 14) SCM_PRODUCT(type, 112, SCM_D14, SCM_E14, 56, 57, 58, 59, 60, 61, 62); \
  if constexpr (N == 16) SCM_PRODUCT(type, 128, SCM_D16, SCM_E16, 64, 65, 66, 67, 68, 69, 70)
  static_assert(N == 1 || N == 2 || N == 8 || N == 12 || N == 14 || N == 16);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    SCM_PRODUCTS("bf16");
  } else {
    SCM_PRODUCTS("f16");
  }
#undef SCM_PRODUCTS
#undef SCM_PRODUCT
}

// The same with a in shared memory too, by rows, and b as it is if not by columns.
template <class T, int N>
__device__ __forceinline__ void product(float (&d)[N][4], uint64_t a, uint64_t b, bool add) {
#define SCM_PRODUCT(type, n, list, outputs, a0, b0, add0)                                  \
  asm volatile(                                                                            \
      "{\n"                                                                                \
      ".reg .pred add;\n"                                                                  \
      "setp.ne.b32 add, %" #add0                                                           \
      ", 0;\n"                                                                             \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list "}, %" #a0 \
      ", %" #b0                                                                            \
      ", add, 1, 1, 0, 0;\n"                                                               \
      "}"                                                                                  \
      : outputs                                                                            \
      : "l"(a), "l"(b), "r"(int(add)))
#define SCM_PRODUCTS(type)                                                 \
  if constexpr (N == 6) SCM_PRODUCT(type, 48, SCM_D6, SCM_E6, 24, 25, 26); \
  if constexpr (N == 8) SCM_PRODUCT(type, 64, SCM_D8, SCM_E8, 32, 33, 34)
  static_assert(N == 6 || N == 8);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    SCM_PRODUCTS("bf16");
  } else {
    SCM_PRODUCTS("f16");
  }
#undef SCM_PRODUCTS
#undef SCM_PRODUCT
}

#undef SCM_D1
#undef SCM_D2
#undef SCM_D6
#undef SCM_D8
#undef SCM_D12
#undef SCM_D14
#undef SCM_D16
#undef SCM_E
#undef SCM_E1
#undef SCM_E2
#undef SCM_E6
#undef SCM_E8
#undef SCM_E12
#undef SCM_E14
#undef SCM_E16

}  // namespace cuda
}  // namespace scm
