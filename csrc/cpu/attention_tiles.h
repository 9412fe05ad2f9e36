// What the forward and the backward of attention share: tiles of the inputs in the layouts that
// the matrix kernel wants, converted to its elements on the way where they are not theirs already.
#pragma once

#include "gemm.h"

namespace scm {
namespace SCM_ISA {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Floats from a row of `columns` to the next in scratch memory: an odd number of cache lines, so
// that a column of a tile is spread over all sets of a cache. At 256 bytes it would share a
// quarter.
constexpr int64_t pitch_of(int64_t columns) { return round_up(columns, 16) | 16; }

SCM_INLINE const char* bytes(const float* x) { return reinterpret_cast<const char*>(x); }

// Elements of four bytes that `width` features make: pairs of bfloat16, or floats.
template <class Element>
constexpr int64_t elements(int64_t width) {
  return (width + Element::kPerElement - 1) / Element::kPerElement;
}

// Hands out pieces of a thread's scratch memory, each aligned to 64.
struct Arena {
  char* next;

  float* floats(int64_t count) {
    char* piece = next;
    next += round_up(4 * count, 64);
    return reinterpret_cast<float*>(piece);
  }
};

// A matrix within a tensor of four dimensions: one (batch, head).
struct Matrix {
  char* data;
  int64_t row, column;  // strides in bytes
  Type type;

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t i) const { return data + i * row; }
};

static inline Matrix matrix(const Tensor& x, int64_t b, int64_t h) {
  if (!x) return {nullptr, 0, 0, x.type};
  const int64_t size = size_of(x.type);
  return {x.data + (b * x.stride[0] + h * x.stride[1]) * size, x.stride[2] * size,
          x.stride[3] * size, x.type};
}

// kLanes elements of a row [width], from feature `from` on; zeros past its end.
template <class Element>
SCM_INLINE VecF load_elements(const char* row, Type type, int64_t from, int64_t width) {
  if constexpr (Element::kPerElement == 2) {
    const int64_t count = width - from;
    if (count >= 2 * kLanes) return load<VecF>(row + 2 * from);
    alignas(64) char buffer[4 * kLanes] = {};
    if (count > 0) std::memcpy(buffer, row + 2 * from, 2 * count);
    return load<VecF>(buffer);
  } else {
    const char* at = row + from * size_of(type);
    if (from + kLanes <= width) return load_as_float(at, type);
    return load_some_as_float(at, type, width - from, 1);
  }
}

// kLanes elements of kLanes rows, from feature `from` on, transposed; zeros past the last row.
template <class Element>
SCM_INLINE void load_transposed(const Matrix& x, int64_t first, int64_t rows, int64_t from,
                                int64_t width, VecF (&to)[kLanes]) {
  for (int64_t r = 0; r < kLanes; ++r) {
    const char* at = x.at(first + r);
    to[r] = r < rows ? load_elements<Element>(at, x.type, from, width) : VecF{};
  }
  transpose(to);
}

// to [elements(width), columns] = x [rows, width] transposed; zeros in columns past the rows.
template <class Element>
static void transpose_rows(const Matrix& x, int64_t first, int64_t rows, int64_t width, float* to,
                           int64_t columns, int64_t pitch) {
  const int64_t height = elements<Element>(width);
  for (int64_t i = 0; i < columns; i += kLanes) {
    for (int64_t j = 0; j < height; j += kLanes) {
      const int64_t from = j * Element::kPerElement;
      const bool whole = i + kLanes <= rows && from + kLanes * Element::kPerElement <= width;
      VecF block[kLanes];
      if (whole && (Element::kPerElement == 2 || x.type == Type::kFloat32)) {
        const char* at = x.at(first + i) + 4 * j;
        SCM_UNROLL
        for (int r = 0; r < kLanes; ++r) block[r] = load<VecF>(at + r * x.row);
        transpose(block);
      } else {
        load_transposed<Element>(x, first + i, rows - i, from, width, block);
      }
      const int64_t count = least<int64_t>(kLanes, height - j);
      for (int64_t r = 0; r < count; ++r) store(to + (j + r) * pitch + i, block[r]);
    }
  }
}

// to [rows, elements(width)] = rows of x, converted to elements, zeros up to a whole vector.
template <class Element>
static void copy_rows(const Matrix& x, int64_t first, int64_t rows, int64_t width, float* to) {
  const int64_t count = elements<Element>(width), pitch = pitch_of(count);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < count; j += kLanes) {
      store(to + i * pitch + j,
            load_elements<Element>(x.at(first + i), x.type, j * Element::kPerElement, width));
    }
  }
}

// Rows of x as they lie if they are elements already, else copied to `scratch`; for a sum over the
// features.
template <class Element>
static Left rows_as_elements(const Matrix& x, int64_t first, int64_t rows, int64_t width,
                             float* scratch) {
  if (!x) return {};
  const bool direct = Element::kPerElement == 2 ? width % 2 == 0 : x.type == Type::kFloat32;
  if (direct) return {x.at(first), x.row, 4};
  copy_rows<Element>(x, first, rows, width, scratch);
  return {bytes(scratch), 4 * pitch_of(elements<Element>(width)), 4};
}

// x transposed, for a sum over its rows; bfloat16 as pairs of consecutive rows.
template <class Element>
static Left columns_as_elements(const Matrix& x, int64_t first, int64_t rows, int64_t width,
                                float* scratch) {
  if (!x) return {};
  if constexpr (Element::kPerElement == 1) {
    const Left left = rows_as_elements<Element>(x, first, rows, width, scratch);
    return {left.data, left.step, left.row};
  } else {
    const int64_t pitch = pitch_of(width);
    for (int64_t i = 0; i < rows; i += 2) {
      const char* even = x.at(first + i);
      const char* odd = x.at(first + i + 1);
      for (int64_t j = 0; j < width; j += kLanes) {
        VecH upper{}, lower{};
        if (j + kLanes <= width && i + 1 < rows) {
          upper = load<VecH>(even + 2 * j), lower = load<VecH>(odd + 2 * j);
        } else {
          const int64_t size = 2 * least<int64_t>(kLanes, width - j);
          std::memcpy(&upper, even + 2 * j, size);
          if (i + 1 < rows) std::memcpy(&lower, odd + 2 * j, size);
        }
        store(scratch + i / 2 * pitch + j, Element::pairs(Element::join(upper, lower)));
      }
    }
    return {bytes(scratch), 4, 4 * pitch};
  }
}

// Rows of `to` [rows, width] from their transposed values: value(feature, column) is a vector of
// rows.
template <class Value>
static void store_transposed(const Matrix& to, int64_t first, int64_t rows, int64_t width,
                             const Value& value) {
  const int64_t size = size_of(to.type);
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const int64_t count = least<int64_t>(kLanes, width - j);
      const int64_t height = least<int64_t>(kLanes, rows - i);
      VecF block[kLanes];
      SCM_UNROLL
      for (int r = 0; r < kLanes; ++r) block[r] = r < count ? value(j + r, i) : VecF{};
      transpose(block);
      char* at = to.at(first + i) + j * to.column;
      const bool whole = count == kLanes && to.column == size;
      if (whole && height == kLanes && to.type == Type::kFloat32) {
        SCM_UNROLL
        for (int r = 0; r < kLanes; ++r) store(at + r * to.row, block[r]);
        continue;
      }
      for (int64_t r = 0; r < height; ++r, at += to.row) {
        if (whole) {
          store_from_float(at, to.type, block[r]);
        } else {
          store_some_from_float(at, to.type, block[r], count, to.column / size);
        }
      }
    }
  }
}

// c1 = a1 b1 and c2 = a1 b2 + a2 b1, where a2 or b2 may be absent, and then costs nothing.
template <class Element>
static void dual_product(int64_t rows, int64_t vectors, int64_t steps, const Left& left1,
                         const Left& left2, const Right& right, const Sum& sum) {
  if (right.b2 != nullptr && left2.data != nullptr) {
    dual_gemm<Element, Products::kDual>(rows, vectors, steps, left1, left2, right, sum);
  } else if (right.b2 != nullptr) {
    dual_gemm<Element, Products::kShared>(rows, vectors, steps, left1, left1, right, sum);
  } else {
    const Right only{right.b1, right.b1, right.step};
    const Sum to1{sum.c1, sum.c1, sum.row, sum.zero, sum.rescale};
    dual_gemm<Element, Products::kFirst>(rows, vectors, steps, left1, left1, only, to1);
    if (left2.data == nullptr) return;
    const Sum to2{sum.c2, sum.c2, sum.row, sum.zero, sum.rescale};
    dual_gemm<Element, Products::kFirst>(rows, vectors, steps, left2, left2, only, to2);
  }
}

// c1 += a1 b1 and c2 += a1 b2 + a2 b1, of which either sum may be unwanted too.
template <class Element>
static void add_product(int64_t rows, int64_t vectors, int64_t steps, const Left& left1,
                        const Left& left2, const Right& right, float* c1, float* c2, int64_t row) {
  const auto add = [&](const Left& left, const char* b, float* c) {
    if (left.data == nullptr || b == nullptr || c == nullptr) return;
    const Right only{b, b, right.step};
    const Sum sum{c, c, row, false, nullptr};
    dual_gemm<Element, Products::kFirst>(rows, vectors, steps, left, left, only, sum);
  };
  if (c1 != nullptr && c2 != nullptr && right.b1 != nullptr) {
    dual_product<Element>(rows, vectors, steps, left1, left2, right, {c1, c2, row, false, nullptr});
  } else {
    add(left1, right.b1, c1);
    add(left1, right.b2, c2);
    add(left2, right.b1, c2);
  }
}

// --- sums over the features ----------------------------------------------------------------------

struct RowSums {
  VecF beta, delta;
};

// dtO O, and dO O + dtO tO, of kLanes rows of `width` features, summed in the order in which a
// product of matrices sums B = dtO V and A = dO V + dtO tV: where one key takes all, O and tO are
// its V and tV, and B - beta and A - delta cancel to the last digit, as in eager's formula.
static inline RowSums sums_of_rows(const Matrix& out, const Matrix& t_out, const Matrix& dout,
                                   const Matrix& dt_out, int64_t first, int64_t rows,
                                   int64_t width) {
  const auto add = [](VecF sum, VecF cotangent, VecF output) {
    // A tO that float16 does not hold is no part of a gradient that nothing flows back to.
    return Float32::multiply_add(sum, cotangent, cotangent == 0.0f ? VecF{} : output);
  };
  RowSums total{};
  for (int64_t start = 0; start < width; start += kStepsASum) {
    RowSums part{};
    for (int64_t j = start; j < least(width, start + kStepsASum); j += kLanes) {
      VecF o[kLanes], to[kLanes] = {}, d[kLanes] = {}, dt[kLanes] = {};
      load_transposed<Float32>(out, first, rows, j, width, o);
      if (t_out) load_transposed<Float32>(t_out, first, rows, j, width, to);
      if (dout) load_transposed<Float32>(dout, first, rows, j, width, d);
      if (dt_out) load_transposed<Float32>(dt_out, first, rows, j, width, dt);
      SCM_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        part.beta = add(part.beta, dt[i], o[i]);
        part.delta = add(add(part.delta, d[i], o[i]), dt[i], to[i]);
      }
    }
    total.beta += part.beta, total.delta += part.delta;
  }
  return total;
}

// --- masks ---------------------------------------------------------------------------------------

struct Tile {
  int64_t row, rows, key, keys;  // from row and key on
  int64_t columns;               // rows, rounded up to whole vectors
  int64_t pitch;                 // floats from a key to the next
};

// to [keys, columns] = a tile of a mask, transposed, as what is added to the scores; `outside` past
// the last row.
static inline void transpose_mask(const Matrix& mask, const Tile& tile, float outside, float* to) {
  const int64_t size = size_of(mask.type);
  for (int64_t i = 0; i < tile.columns; i += kLanes) {
    for (int64_t j = 0; j < tile.keys; j += kLanes) {
      VecF block[kLanes];
      const int64_t count = least<int64_t>(kLanes, tile.keys - j);
      for (int64_t r = 0; r < kLanes; ++r) {
        if (i + r >= tile.rows) {
          block[r] = broadcast(outside);
          continue;
        }
        const char* at = mask.at(tile.row + i + r) + (tile.key + j) * mask.column;
        if (mask.column == size && count == kLanes) {
          block[r] = load_as_float(at, mask.type);
        } else {
          block[r] = load_some_as_float(at, mask.type, count, mask.column / size);
        }
      }
      transpose(block);
      for (int64_t r = 0; r < count; ++r) store(to + (j + r) * tile.pitch + i, block[r]);
    }
  }
}

// How much of a tile a mask touches; kAll: no key lives.
enum class Cover { kNothing, kSome, kAll };

// bias [keys, columns]: what mask and causality add to the scores of a tile, -infinity where a key
// takes no part. Not written where there is neither.
static inline Cover mask_tile(const Matrix& mask, bool causal, const Tile& tile, float* bias) {
  const VecF dead = broadcast(-__builtin_inff());
  const bool diagonal = causal && tile.key + tile.keys - 1 > tile.row;
  if (!mask && !diagonal) return Cover::kNothing;
  if (mask) transpose_mask(mask, tile, -__builtin_inff(), bias);
  VecI touched{}, live{}, lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t i = 0; i < tile.columns; i += kLanes) {
    const VecI row = lane + static_cast<int32_t>(i);
    for (int64_t key = 0; key < tile.keys; ++key) {
      float* at = bias + key * tile.pitch + i;
      VecF x = mask ? load<VecF>(at) : VecF{};
      if (diagonal) {
        x = row >= static_cast<int32_t>(tile.key + key - tile.row) ? x : dead;
        store(at, x);
      }
      touched |= x != 0.0f;
      live |= x != dead;
    }
  }
  int32_t any_touched = 0, any_live = 0;
  for (int i = 0; i < kLanes; ++i) {
    any_touched |= touched[i];
    any_live |= live[i];
  }
  return any_live == 0 ? Cover::kAll : any_touched == 0 ? Cover::kNothing : Cover::kSome;
}

}  // namespace SCM_ISA
}  // namespace scm
