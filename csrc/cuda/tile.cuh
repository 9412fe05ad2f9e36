// Rows of 16-bit elements in shared memory, swizzled so that the eight rows of a matrix lie in
// different banks, whatever the head dimension.
#pragma once

#include "ptx.cuh"

namespace scm {
namespace cuda {

// A row is kChunks pieces of 16 bytes. Eight rows start at kChunks multiples of 16 bytes modulo
// 128: 8 / g different places, g = gcd(kChunks, 8). Exclusive or of the piece's number with a
// number below g that changes every 8 / g rows moves them apart; it stays in the row, as g divides
// kChunks.
template <int kD>
struct Swizzle {
  static constexpr int kChunks = kD / 8, kRowBytes = 2 * kD;
  static constexpr int kGroup = kChunks % 8 == 0   ? 8
                                : kChunks % 4 == 0 ? 4
                                : kChunks % 2 == 0 ? 2
                                                   : 1;

  // What the number of a piece is combined with; the same for rows 8 apart.
  static __device__ __forceinline__ int turn(int row) { return row / (8 / kGroup) % kGroup; }

  // Bytes from the start of the tile to a piece of a row.
  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * kRowBytes + (chunk ^ turn(row)) * 16;
  }

  // The same for the piece `chunks`, an even constant, after the first or second of a row. Below
  // the multiples of kGroup the number only selects bits of the address, so one register serves all
  // pieces that differ in multiples of kGroup. Where that is 8, the compiler does better by itself.
  static __device__ __forceinline__ int at(int row, int first, int chunks) {
    if (kGroup == 8) return at(row, first + chunks);
    return (at(row, first) ^ (chunks % kGroup * 16)) + chunks / kGroup * kGroup * 16;
  }
};

// One of the tensors of a head: rows of kD elements, `stride` bytes from one to the next.
struct Rows {
  char* data;
  int64_t stride;
};

// Copies kRows rows from row `first` on into a tile, by kThreads threads; rows from `end` on are
// zeros. Four neighbours read 64 bytes of a row, at offsets that the compiler knows; the next four
// read a row whose pieces lie in the other banks.
template <int kD, int kRows, int kThreads>
__device__ __forceinline__ void copy_tile(uint32_t tile, const Rows& x, int first, int end,
                                          unsigned thread) {
  using S = Swizzle<kD>;
  constexpr int kApart = S::kGroup == 8 ? 4 : 4 / S::kGroup;
  const int column = thread % 4, pair = thread / 8;
  const int line = thread / 4 % 2 * kApart + pair % kApart + pair / kApart * 2 * kApart;
#pragma unroll
  for (int start = 0; start < kRows; start += kThreads / 4) {
    const int row = start + line;
    const bool live = first + row < end;
    const char* from = x.data + (first + row) * x.stride + column * 16;
#pragma unroll
    for (int chunk = 0; chunk < S::kChunks; chunk += 4) {
      if (chunk + 4 <= S::kChunks || chunk + column < S::kChunks) {
        copy16(tile + S::at(row, chunk + column), from + chunk * 16, live);
      }
    }
  }
}

}  // namespace cuda
}  // namespace scm
