// Rows of operands in and out of the kernel's own number type: conversion, strides, zero padding, transposition.
#pragma once
#include <cstdint>
#include <cstring>

#include "../lam.h"

namespace lam {
namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float bf16_to_float(uint16_t x) { return float_of_bits(uint32_t{x} << 16); }
inline uint16_t float_to_bf16(float x) {  // nearest even; NaN stays NaN
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : rounded);
}
inline float f16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t{x & 0x8000u} << 16, rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // the exponent is moved by a multiplication, which also makes denormals right
  return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * 0x1p112f));
}
inline uint16_t float_to_f16(float x) {  // nearest even
  const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u)  // a denormal half: let float addition do the rounding at the right bit
    return static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13));
}

inline int64_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

inline const char* at(const View& v, int64_t offset) { return static_cast<const char*>(v.data) + offset * size_of(v.dtype); }
inline char* at_mutable(const View& v, int64_t offset) { return static_cast<char*>(v.data) + offset * size_of(v.dtype); }

template <class T>
inline T load_scalar(const char* p, DType d) {
  switch (d) {
    case DType::f32: return static_cast<T>(*reinterpret_cast<const float*>(p));
    case DType::f64: return static_cast<T>(*reinterpret_cast<const double*>(p));
    case DType::bf16: return static_cast<T>(bf16_to_float(*reinterpret_cast<const uint16_t*>(p)));
    default: return static_cast<T>(f16_to_float(*reinterpret_cast<const uint16_t*>(p)));
  }
}

// dst[0, n) = src[0], src[stride], ...; dst may be zeroed up to the next whole word.
template <class V>
void load_row(typename V::T* __restrict dst, const char* __restrict src, DType d, int64_t stride, int64_t n) {
  using T = typename V::T;
  if (stride == 1 && size_of(d) == sizeof(T)) {
    const T* s = reinterpret_cast<const T*>(src);
    int64_t k = 0;
    for (; k + V::W <= n; k += V::W) V::store(dst + k, V::load(s + k));
    if (k < n) V::store(dst + k, V::load(s + k, V::from_bits((uint32_t{1} << (n - k)) - 1)));
  } else if (stride == 0) {
    const T x = n > 0 ? load_scalar<T>(src, d) : T(0);
    for (int64_t k = 0; k < n; ++k) dst[k] = x;
  } else if (stride != 1) {
    for (int64_t k = 0; k < n; ++k) dst[k] = load_scalar<T>(src + k * stride * size_of(d), d);
  } else if (d == DType::f32) {
    const float* s = reinterpret_cast<const float*>(src);
    for (int64_t k = 0; k < n; ++k) dst[k] = static_cast<T>(s[k]);
  } else if (d == DType::f64) {
    const double* s = reinterpret_cast<const double*>(src);
    for (int64_t k = 0; k < n; ++k) dst[k] = static_cast<T>(s[k]);
  } else {
    const uint16_t* s = reinterpret_cast<const uint16_t*>(src);
    int64_t k = 0;
#ifdef __AVX2__
    for (; k + V::W <= n; k += V::W) V::store(dst + k, d == DType::bf16 ? V::from_bf16(s + k) : V::from_f16(s + k));
#endif
    for (; k < n; ++k) dst[k] = static_cast<T>(d == DType::bf16 ? bf16_to_float(s[k]) : f16_to_float(s[k]));
  }
}

// src[0, W)
template <class V>
typename V::reg load_word(const char* src, DType d) {
  using T = typename V::T;
  if (size_of(d) == sizeof(T)) return V::load(reinterpret_cast<const T*>(src));
#ifdef __AVX2__
  const uint16_t* s = reinterpret_cast<const uint16_t*>(src);
  return d == DType::bf16 ? V::from_bf16(s) : V::from_f16(s);
#else
  T word[V::W];
  load_row<V>(word, src, d, 1, V::W);
  return V::load(word);
#endif
}

// dst[0], dst[stride], ... = src[0, n) * factor
template <class T>
void store_row(char* __restrict dst, DType d, int64_t stride, const T* __restrict src, T factor, int64_t n) {
  if (d == DType::f32) {
    float* p = reinterpret_cast<float*>(dst);
    if (stride == 1)
      for (int64_t k = 0; k < n; ++k) p[k] = static_cast<float>(src[k] * factor);
    else
      for (int64_t k = 0; k < n; ++k) p[k * stride] = static_cast<float>(src[k] * factor);
  } else if (d == DType::f64) {
    double* p = reinterpret_cast<double*>(dst);
    for (int64_t k = 0; k < n; ++k) p[k * stride] = src[k] * factor;
  } else {
    uint16_t* p = reinterpret_cast<uint16_t*>(dst);
    if (d == DType::bf16 && stride == 1)
      for (int64_t k = 0; k < n; ++k) p[k] = float_to_bf16(static_cast<float>(src[k] * factor));
    else if (d == DType::bf16)
      for (int64_t k = 0; k < n; ++k) p[k * stride] = float_to_bf16(static_cast<float>(src[k] * factor));
    else
      for (int64_t k = 0; k < n; ++k) p[k * stride] = float_to_f16(static_cast<float>(src[k] * factor));
  }
}

// dst[0, n) = src[0, n)
template <class V>
void store_words(char* dst, DType d, const typename V::T* src, int64_t n) {
  using T = typename V::T;
  if (size_of(d) != sizeof(T)) return store_row<T>(dst, d, 1, src, T(1), n);
  T* p = reinterpret_cast<T*>(dst);
  int64_t k = 0;
  for (; k + V::W <= n; k += V::W) V::store(p + k, V::load(src + k));
  if (k < n) V::store(p + k, V::load(src + k), V::from_bits((uint32_t{1} << (n - k)) - 1));
}

// A matrix in the kernel's number type: either the caller's memory or a staged copy.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t ld = 0;
  T* row(int64_t r) const { return data + r * ld; }
};

// Can the rows of this operand be used where they lie?
template <class V>
bool in_place(DType d) {
  return size_of(d) == sizeof(typename V::T);
}

// `count` rows of `width`, `row_stride` elements apart: in place if they can be used there, else copied to buffer.
template <class V>
Rows<typename V::T> stage_rows(const char* src, DType d, int64_t row_stride, int64_t count, int64_t width,
                               typename V::T* buffer) {
  using T = typename V::T;
  if (in_place<V>(d)) return {reinterpret_cast<T*>(const_cast<char*>(src)), row_stride};
  const int64_t ld = round_up(width, V::W);
  for (int64_t r = 0; r < count; ++r) load_row<V>(buffer + r * ld, src + r * row_stride * size_of(d), d, 1, width);
  return {buffer, ld};
}

#ifdef __AVX512F__
// dst[c][r] = src[r][c] for 16 x 16 floats
inline void transpose_word_block(const float* src, int64_t lds, float* dst, int64_t ldd) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) r[k] = _mm512_loadu_si512(src + k * lds);
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    t[2 * k] = _mm512_unpacklo_epi32(r[2 * k], r[2 * k + 1]);
    t[2 * k + 1] = _mm512_unpackhi_epi32(r[2 * k], r[2 * k + 1]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    r[4 * k] = _mm512_unpacklo_epi64(t[4 * k], t[4 * k + 2]);
    r[4 * k + 1] = _mm512_unpackhi_epi64(t[4 * k], t[4 * k + 2]);
    r[4 * k + 2] = _mm512_unpacklo_epi64(t[4 * k + 1], t[4 * k + 3]);
    r[4 * k + 3] = _mm512_unpackhi_epi64(t[4 * k + 1], t[4 * k + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm512_shuffle_i32x4(r[k], r[4 + k], 0x88);
    t[4 + k] = _mm512_shuffle_i32x4(r[k], r[4 + k], 0xdd);
    t[8 + k] = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0x88);
    t[12 + k] = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0xdd);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    _mm512_storeu_si512(dst + k * ldd, _mm512_shuffle_i32x4(t[k], t[8 + k], 0x88));
    _mm512_storeu_si512(dst + (8 + k) * ldd, _mm512_shuffle_i32x4(t[k], t[8 + k], 0xdd));
    _mm512_storeu_si512(dst + (4 + k) * ldd, _mm512_shuffle_i32x4(t[4 + k], t[12 + k], 0x88));
    _mm512_storeu_si512(dst + (12 + k) * ldd, _mm512_shuffle_i32x4(t[4 + k], t[12 + k], 0xdd));
  }
}
#endif

template <class V>
void transpose_block(const typename V::T* src, int64_t lds, typename V::T* dst, int64_t ldd) {
#ifdef __AVX512F__
  transpose_word_block(src, lds, dst, ldd);
#else
  for (int r = 0; r < V::W; ++r)
    for (int c = 0; c < V::W; ++c) dst[c * ldd + r] = src[r * lds + c];
#endif
}

// Room for the panels of n rows: the last block of a panel is written whole.
template <class V>
int64_t panel_elements(int64_t n, int64_t depth) {
  return round_up(n, V::W) * depth + V::W * V::W;
}

// rows [n, depth] -> panels [n / W][depth][W] (gemm.h), the columns beyond n zero.
template <class V>
void pack_transposed(Rows<typename V::T> rows, int64_t n, int64_t depth, typename V::T* panels) {
  using T = typename V::T;
  constexpr int64_t W = V::W;
  for (int64_t j = 0; j < n; j += W) {
    T* dst = panels + j * depth;
    const int64_t valid = n - j < W ? n - j : W;
    const T* src = rows.data + j * rows.ld;
    const int64_t next_valid = n - j < 2 * W ? n - j : 2 * W;
    for (int64_t k = W; k < next_valid; ++k)  // the next panel's rows, called for early
      for (int64_t d = 0; d < depth; d += W) __builtin_prefetch(src + k * rows.ld + d);
    for (int64_t d = 0; d < depth; d += W) {
      const int64_t left = depth - d < W ? depth - d : W;
      if (valid == W && left == W) {
        transpose_block<V>(src + d, rows.ld, dst + d * W, W);
        continue;
      }
      alignas(64) T block[W * W];
      const auto inside = V::from_bits((uint32_t{1} << left) - 1);
      for (int64_t k = 0; k < W; ++k)
        V::store(block + k * W, k < valid ? V::load(src + k * rows.ld + d, inside) : V::zero());
      transpose_block<V>(block, W, dst + d * W, W);
    }
  }
}

}  // namespace
}  // namespace lam
