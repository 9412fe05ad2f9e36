// One micro-kernel for all matrix products of attention and its tangent, forward and backward:
//
//     c1 += a1 b1            c2 += a1 b2 + a2 b1
//
// the product of two dual matrices. Broadcast elements of a meet vectors of b and c: a is read in
// whatever layout it has, c is a tile of registers. With S^T = K Q^T and O^T = V^T P the vectors
// run along the queries, so that K, V and their tangents are read from where they lie, and no lane
// is wasted on a head dimension that is not a multiple of a vector.
//
// Register tiles of 6 x 2 vectors, with 16 registers 3 x 2 for two sums: one load of b serves 6
// rows and one of a serves 2 columns, and 12 to 24 accumulators hide the latency of an FMA.
#pragma once

#include "simd.h"

namespace scm {
namespace SCM_ISA {

// What one element of a and one of b are, both four bytes: a float, or a pair of bfloat16 of two
// consecutive steps of the sum.
struct Float32 {
  static constexpr int kPerElement = 1;
  typedef VecF Vec;
  SCM_INLINE Vec broadcast_element(const char* from) {
    float x;
    std::memcpy(&x, from, sizeof x);
    return broadcast(x);
  }
  SCM_INLINE VecF multiply_add(VecF c, Vec a, Vec b) { return c + a * b; }
};

// SCM_EMULATE_PAIRS: tests run what is about pairs on processors without an instruction for them.
#if defined(__AVX512BF16__) || defined(SCM_EMULATE_PAIRS)
#define SCM_BFLOAT16_PAIRS
struct BFloat16Pair {
  static constexpr int kPerElement = 2;
  typedef VecI Vec;
  SCM_INLINE Vec broadcast_element(const char* from) {
    int32_t x;
    std::memcpy(&x, from, sizeof x);
    return x - VecI{};
  }
  SCM_INLINE VecF multiply_add(VecF c, Vec a, Vec b) {
#if !defined(__AVX512BF16__)
    const VecU x = (VecU)a, y = (VecU)b, upper = VecU{} + 0xffff0000;
    return c + from_bf16(x) * from_bf16(y) + (VecF)(x & upper) * (VecF)(y & upper);
#elif defined(__clang__)  // Clang 16 does not end on the intrinsic
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#else
    return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  }

  // Two vectors rounded to bfloat16, as they are and as pairs with `low` in the lower halves.
  typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));
#if defined(__AVX512BF16__)
  SCM_INLINE Halves round(VecF low, VecF high) {
    return (Halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
  SCM_INLINE Halves join(VecH low, VecH high) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                   16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  SCM_INLINE VecU pairs(Halves x) {
    return (VecU)__builtin_shufflevector(x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                         23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                         15, 31);
  }
#else
  SCM_INLINE Halves round(VecF low, VecF high) {
    return join(__builtin_convertvector(to_bf16(low), VecH),
                __builtin_convertvector(to_bf16(high), VecH));
  }
  SCM_INLINE Halves join(VecH low, VecH high) {
    Halves x;
    std::memcpy(&x, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&x) + sizeof low, &high, sizeof high);
    return x;
  }
  SCM_INLINE VecU pairs(Halves x) {
    VecH low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return __builtin_convertvector(low, VecU) | __builtin_convertvector(high, VecU) << 16;
  }
#endif
};
#endif

// The products that are wanted; an absent tangent costs nothing.
enum class Products { kFirst, kShared, kDual };  // c1 += a1 b1; also c2 += a1 b2; also += a2 b1

// [rows, steps], strides in bytes.
struct Left {
  const char* data;
  int64_t row, step;
};

// b1, b2 [steps, columns], four bytes an element.
struct Right {
  const char *b1, *b2;
  int64_t step;  // in bytes
};

// c1, c2 [rows, columns] float32. The sum is added to zero, to what is there, or to that scaled by
// `rescale`, a factor for each column: once, at the end, so that a long sum is one of short ones.
struct Sum {
  float *c1, *c2;
  int64_t row;  // in elements
  bool zero;
  const float* rescale;
};

template <class Element, Products kProducts, int kRows, int kCols>
static void register_tile(int64_t steps, const Left& left1, const Left& left2, const Right& right,
                          const Sum& to) {
  const Sum sum = to;  // a copy, which no store through its pointers can change
  using Vec = typename Element::Vec;
  constexpr bool kSecond = kProducts != Products::kFirst;
  constexpr bool kDual = kProducts == Products::kDual;
  VecF c1[kRows][kCols] = {}, c2[kRows][kCols] = {};
  const char *a1 = left1.data, *a2 = left2.data, *b1 = right.b1, *b2 = right.b2;
  for (int64_t step = 0; step < steps; ++step) {
    Vec x[kCols], y[kCols];
    SCM_UNROLL
    for (int j = 0; j < kCols; ++j) {
      x[j] = load<Vec>(b1 + 4 * j * kLanes);
      if constexpr (kSecond) y[j] = load<Vec>(b2 + 4 * j * kLanes);
    }
    SCM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Vec a = Element::broadcast_element(a1 + i * left1.row);
      SCM_UNROLL
      for (int j = 0; j < kCols; ++j) {
        c1[i][j] = Element::multiply_add(c1[i][j], a, x[j]);
        if constexpr (kSecond) c2[i][j] = Element::multiply_add(c2[i][j], a, y[j]);
      }
      if constexpr (kDual) {
        const Vec t = Element::broadcast_element(a2 + i * left2.row);
        SCM_UNROLL
        for (int j = 0; j < kCols; ++j) c2[i][j] = Element::multiply_add(c2[i][j], t, x[j]);
      }
    }
    a1 += left1.step;
    if constexpr (kDual) a2 += left2.step;
    b1 += right.step;
    if constexpr (kSecond) b2 += right.step;
  }
  SCM_UNROLL
  for (int i = 0; i < kRows; ++i) {
    SCM_UNROLL
    for (int j = 0; j < kCols; ++j) {
      float* first = sum.c1 + i * sum.row + j * kLanes;
      float* second = sum.c2 + i * sum.row + j * kLanes;
      if (!sum.zero) {
        const VecF factor = sum.rescale ? load<VecF>(sum.rescale + j * kLanes) : broadcast(1.0f);
        c1[i][j] += load<VecF>(first) * factor;
        if constexpr (kSecond) c2[i][j] += load<VecF>(second) * factor;
      }
      store(first, c1[i][j]);
      if constexpr (kSecond) store(second, c2[i][j]);
    }
  }
}

// Rows of a register tile, two vectors wide.
constexpr int tile_rows(Products products) {
  return products == Products::kFirst || kRegisters > 16 ? 6 : 3;
}

template <class Element, Products kProducts, int kCols, int kRows = tile_rows(kProducts)>
SCM_INLINE void register_tile_of(int64_t rows, int64_t steps, const Left& left1, const Left& left2,
                                 const Right& right, const Sum& sum) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return register_tile_of<Element, kProducts, kCols, kRows - 1>(rows, steps, left1, left2,
                                                                    right, sum);
    }
  }
  register_tile<Element, kProducts, kRows, kCols>(steps, left1, left2, right, sum);
}

// c1, c2 [rows, vectors * kLanes] take in `steps` elements.
template <class Element, Products kProducts>
static void add_steps(int64_t rows, int64_t vectors, int64_t steps, const Left& left1,
                      const Left& left2, const Right& right, const Sum& sum) {
  constexpr int64_t kRows = tile_rows(kProducts);
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t j = 0; j < vectors; j += 2) {
    const int64_t column = j * kLanes;
    const Right b{right.b1 + 4 * column, right.b2 + 4 * column, right.step};
    for (int64_t block = 0, i = 0; block < blocks; ++block) {
      const int64_t height = (rows - i + blocks - block - 1) / (blocks - block);  // even blocks
      const int64_t at = i * sum.row + column;
      const Left a1{left1.data + i * left1.row, left1.row, left1.step};
      const Left a2{left2.data + i * left2.row, left2.row, left2.step};
      const Sum c{sum.c1 + at, sum.c2 + at, sum.row, sum.zero,
                  sum.rescale ? sum.rescale + column : nullptr};
      if (j + 1 < vectors) {
        register_tile_of<Element, kProducts, 2>(height, steps, a1, a2, b, c);
      } else {
        register_tile_of<Element, kProducts, 1>(height, steps, a1, a2, b, c);
      }
      i += height;
    }
  }
}

// Steps that are summed in one go: of more, as 256 features are, a float32 sum loses more digits
// than eager's GEMM does. Without fused multiply-adds (SSE2) every product is rounded too: sums of
// fewer make up for it.
#if defined(__x86_64__) && !defined(__FMA__)
constexpr int64_t kStepsASum = 16;
#else
constexpr int64_t kStepsASum = 128;
#endif

// c1, c2 [rows, vectors * kLanes] from `steps` elements a sum.
template <class Element, Products kProducts>
static void dual_gemm(int64_t rows, int64_t vectors, int64_t steps, Left left1, Left left2,
                      Right right, Sum sum) {
  for (; steps > kStepsASum; steps -= kStepsASum) {
    add_steps<Element, kProducts>(rows, vectors, kStepsASum, left1, left2, right, sum);
    left1.data += kStepsASum * left1.step, left2.data += kStepsASum * left2.step;
    right.b1 += kStepsASum * right.step, right.b2 += kStepsASum * right.step;
    sum.zero = false, sum.rescale = nullptr;
  }
  add_steps<Element, kProducts>(rows, vectors, steps, left1, left2, right, sum);
}

}  // namespace SCM_ISA
}  // namespace scm
