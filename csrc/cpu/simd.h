// Portable vectors of one register's width, by the vector extension of GCC and Clang. Included by
// sources that are compiled once for each instruction set; all of it has internal linkage, so that
// no linker can hand code for one instruction set to another.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define SCM_INLINE [[gnu::always_inline]] static inline
#define SCM_UNROLL _Pragma("GCC unroll 16")

namespace scm {
namespace SCM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VecB __attribute__((vector_size(kLanes)));
typedef double VecD __attribute__((vector_size(4 * kLanes)));  // kLanes / 2 of them

template <class X>
SCM_INLINE X least(X a, X b) {
  return a < b ? a : b;
}

template <class Vec>
SCM_INLINE Vec load(const void* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class Vec>
SCM_INLINE void store(void* to, Vec x) {
  std::memcpy(to, &x, sizeof x);
}

// x as it is, rounded: what made it is not fused with what comes next.
SCM_INLINE VecF rounded(VecF x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

SCM_INLINE VecF broadcast(float x) { return x - VecF{}; }

SCM_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }  // b where a is NaN

// Whether a comparison holds in one of the lanes.
SCM_INLINE bool any(VecI x) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= x[i];
  return found != 0;
}

// e^x for x <= 0 or NaN, to 1.5 units in the last place; 0 below -87.33, where the result would be
// denormal. By e^x = 2^i e^r with |r| <= log(2) / 2 and a polynomial of degree 6 in r.
SCM_INLINE VecF exp_nonpositive(VecF x) {
  const VecF lowest = broadcast(-87.33654f);
  const VecF in_range = x < lowest ? lowest : x;
  const VecF shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF shifted = in_range * 1.44269504f + shifter;
  const VecF i = shifted - shifter;
  VecF r = in_range - i * 0.693359375f;  // log(2) in two parts, the first exact times i
  r = r + i * 2.12194440e-4f;
  VecF y = broadcast(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * r) * r + r + 1.0f;
  const VecI power = ((VecI)shifted + 127) << 23;  // the low bits of `shifted` are i
  const VecF result = y * (VecF)power;
  return x < lowest ? VecF{} : result;
}

// --- wider and narrower -------------------------------------------------------------------------

// kLanes integers of 16 or 8 bits from memory, the low 16 bits of each lane to memory (the others
// are 0), and the lower and the upper half of a vector as float64: GCC makes several instructions
// of what is one, and takes bytes singly. With a mask on AVX-512, as GCC warns of those without.
#if defined(__AVX512F__)
SCM_INLINE VecU load_u16(const char* from) {
  return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(from));
}
SCM_INLINE VecU load_u8(const char* from) {
  return (VecU)_mm512_maskz_cvtepu8_epi32(0xffff, load<__m128i>(from));
}
SCM_INLINE void store_u16(char* to, VecU x) {
  store(to, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x));
}
SCM_INLINE VecD low_as_double(VecF x) {
  return (VecD)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 0));
}
SCM_INLINE VecD high_as_double(VecF x) {
  return (VecD)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 1));
}
#elif defined(__AVX2__)
SCM_INLINE VecU load_u16(const char* from) {
  return (VecU)_mm256_cvtepu16_epi32(load<__m128i>(from));
}
SCM_INLINE VecU load_u8(const char* from) {
  return (VecU)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load<int64_t>(from)));
}
SCM_INLINE void store_u16(char* to, VecU x) {
  const __m256i wide = (__m256i)x;
  const __m128i high = _mm256_extracti128_si256(wide, 1);
  store(to, _mm_packus_epi32(_mm256_castsi256_si128(wide), high));
}
SCM_INLINE VecD low_as_double(VecF x) {
  return (VecD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
}
SCM_INLINE VecD high_as_double(VecF x) {
  return (VecD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
}
#else
SCM_INLINE VecU load_u16(const char* from) {
  return __builtin_convertvector(load<VecH>(from), VecU);
}
SCM_INLINE VecU load_u8(const char* from) {
  return __builtin_convertvector(load<VecB>(from), VecU);
}
SCM_INLINE void store_u16(char* to, VecU x) { store(to, __builtin_convertvector(x, VecH)); }
SCM_INLINE VecD low_as_double(VecF x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1), VecD);
}
SCM_INLINE VecD high_as_double(VecF x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, 2, 3), VecD);
}
#endif

// --- 16-bit floats as float32 and back, to nearest even, by integer arithmetic ------------------

SCM_INLINE VecF from_bf16(VecU bits) { return (VecF)(bits << 16); }

SCM_INLINE VecU to_bf16(VecF x) {
  const VecU u = (VecU)x;
  const VecU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return x == x ? rounded : (u >> 16) | 0x40;  // a NaN stays one
}

SCM_INLINE VecF from_f16(VecU bits) {
  const VecU magnitude = (bits & 0x7fff) << 13;
  // Exponents moved from bias 15 to 127 by a multiplication, which is right for denormals too.
  VecF x = (VecF)magnitude * 0x1p112f;
  const VecU infinite = magnitude | 0x7f800000;  // infinity or NaN
  x = (VecI)magnitude >= 0x0f800000 ? (VecF)infinite : x;
  return (VecF)((VecU)x | ((bits & 0x8000) << 16));
}

SCM_INLINE VecU to_f16(VecF x) {
  const VecU u = (VecU)x;
  const VecU sign = (u >> 16) & 0x8000;
  const VecU magnitude = u & 0x7fffffff;
  const VecU normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 0.5 leaves the denormal's bits, rounded, at the end of the mantissa.
  const VecU denormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000;
  VecU y = (VecI)magnitude < 0x38800000 ? denormal : normal;
  y = (VecI)magnitude >= 0x477ff000 ? VecU{} + 0x7c00 : y;  // rounds to infinity
  y = (VecI)magnitude > 0x7f800000 ? VecU{} + 0x7e00 : y;
  return y | sign;
}

#if defined(__AVX512F__)  // instructions for it; with a mask, as GCC warns of those without
SCM_INLINE VecF load_f16(const char* from) {
  return (VecF)_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from));
}
SCM_INLINE void store_f16(char* to, VecF x) {
  store(to, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
SCM_INLINE VecF load_f16(const char* from) { return (VecF)_mm256_cvtph_ps(load<__m128i>(from)); }
SCM_INLINE void store_f16(char* to, VecF x) {
  store(to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
SCM_INLINE VecF load_f16(const char* from) { return from_f16(load_u16(from)); }
SCM_INLINE void store_f16(char* to, VecF x) { store_u16(to, to_f16(x)); }
#endif

SCM_INLINE int64_t size_of(Type type) {
  return type == Type::kFloat32 ? 4 : type == Type::kBool ? 1 : 2;
}

// kLanes contiguous elements as float32. A bool is 0 where true and -infinity where false: what a
// mask adds to a score.
SCM_INLINE VecF load_as_float(const char* from, Type type) {
  switch (type) {
    case Type::kBFloat16:
      return from_bf16(load_u16(from));
    case Type::kFloat16:
      return load_f16(from);
    case Type::kBool: {
      return load_u8(from) != 0 ? VecF{} : broadcast(-__builtin_inff());
    }
    default:
      return load<VecF>(from);
  }
}

// The same for `count` < kLanes elements, `step` elements apart; zeros after them.
static inline VecF load_some_as_float(const char* from, Type type, int64_t count, int64_t step) {
  alignas(64) char buffer[4 * kLanes] = {};
  const int64_t size = size_of(type);
  for (int64_t i = 0; i < count; ++i) std::memcpy(buffer + i * size, from + i * step * size, size);
  return load_as_float(buffer, type);
}

SCM_INLINE void store_from_float(char* to, Type type, VecF x) {
  switch (type) {
    case Type::kBFloat16:
      store_u16(to, to_bf16(x));
      break;
    case Type::kFloat16:
      store_f16(to, x);
      break;
    default:
      store(to, x);
  }
}

// The same for the first `count` <= kLanes elements, `step` elements apart.
static inline void store_some_from_float(char* to, Type type, VecF x, int64_t count, int64_t step) {
  alignas(64) char buffer[4 * kLanes];
  const int64_t size = size_of(type);
  store_from_float(buffer, type, x);
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * step * size, buffer + i * size, size);
}

// --- transposition ------------------------------------------------------------------------------

// The lower and the upper halves of a and b, their elements in turns.
#if defined(__AVX512F__)
SCM_INLINE VecF interleave_low(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
SCM_INLINE VecF interleave_high(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
#elif defined(__AVX2__)
SCM_INLINE VecF interleave_low(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
SCM_INLINE VecF interleave_high(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
SCM_INLINE VecF interleave_low(VecF a, VecF b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
SCM_INLINE VecF interleave_high(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
#endif

// Rows become columns: a perfect shuffle of the rows, log2(kLanes) times.
SCM_INLINE void transpose(VecF (&x)[kLanes]) {
  SCM_UNROLL
  for (int step = 1; step < kLanes; step *= 2) {
    VecF y[kLanes];
    SCM_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + kLanes / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + kLanes / 2]);
    }
    SCM_UNROLL
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

}  // namespace SCM_ISA
}  // namespace scm
