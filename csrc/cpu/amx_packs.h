// bf16 operands of the AMX products: copied, transposed, laid out in pairs, or made of fp32 rows.
#pragma once
#include <cstdint>

#include "amx_tile.h"
#include "rows.h"
#include "visibility.h"

namespace lam {
namespace {

// Rows of bf16, ld elements apart.
struct Bf16Rows {
  const uint16_t* data;
  int64_t ld, rows, width;
  const uint16_t* row(int64_t r) const { return data + r * ld; }
  // Rows may lie anywhere in the caller's memory: they are called for before it is their turn.
  void fetch(int64_t r) const {
    for (int64_t d = 0; r < rows && d < width; d += 32) __builtin_prefetch(row(r) + d);
  }
};

inline __m512 float_word(const float* row, int64_t c, int64_t cols) {
  return c + 16 <= cols ? _mm512_loadu_ps(row + c)
                        : _mm512_maskz_loadu_ps(static_cast<__mmask16>(low_bits(max64(0, cols - c))), row + c);
}
// 32 or 16 elements from d on of row r, zeros beyond the width and the last row
inline __m512i row_word(const Bf16Rows& x, int64_t r, int64_t d) {
  if (r >= x.rows) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(low_bits(min64(32, x.width - d))), x.row(r) + d);
}
inline __m512i row_half(const Bf16Rows& x, int64_t r, int64_t d) {
  if (r >= x.rows) return _mm512_setzero_si512();
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(low_bits(min64(16, x.width - d))), x.row(r) + d));
}
// 16 elements from d on of rows r and r + 1, in pairs
inline __m512i row_pair(const Bf16Rows& x, int64_t r, int64_t d) {
  return _mm512_or_si512(row_half(x, r, d), _mm512_slli_epi32(row_half(x, r + 1, d), 16));
}

inline void copy_rows(const Bf16Rows& x, int64_t padded, uint16_t* to) {
  for (int64_t r = 0; r < round_up(x.rows, 32); ++r) {
    x.fetch(r + 16);
    for (int64_t d = 0; d < padded; d += 32) _mm512_storeu_si512(to + r * padded + d, row_word(x, r, d));
  }
}

// [row block of 16][width block of 32][16 pairs along the width][16 rows]
inline void pack_along_width(const Bf16Rows& x, int64_t padded, uint16_t* to) {
  alignas(64) float block[16 * 16];
  for (int64_t r = 0; r < round_up(x.rows, 16); r += 16) {
    for (int64_t k = r + 16; k < r + 32; ++k) x.fetch(k);
    for (int64_t d = 0; d < padded; d += 32) {
      for (int64_t k = 0; k < 16; ++k) _mm512_store_si512(block + k * 16, row_word(x, r + k, d));
      transpose_word_block(block, 16, reinterpret_cast<float*>(to + r * padded + d * 16), 16);
    }
  }
}

// [width block of 16][pairs of rows, of `capacity` rows][16]; rows are read up to a block of 32 past the last
inline void pack_along_rows(const Bf16Rows& x, int64_t capacity, uint16_t* to) {
  const int64_t rows = min64(capacity, round_up(x.rows, 32) + 32);
  for (int64_t r = 0; r < rows; r += 2) {
    x.fetch(r + 16);
    x.fetch(r + 17);
    for (int64_t d = 0; d < x.width; d += 16) _mm512_storeu_si512(to + d * capacity + r * 16, row_pair(x, r, d));
  }
}

// [width][capacity], rows beyond the last zero up to a block of 32
inline void pack_transposed_rows(const Bf16Rows& x, int64_t capacity, uint16_t* to) {
  alignas(64) float block[16 * 16];
  for (int64_t d = 0; d < x.width; d += 16)
    for (int64_t r = 0; r < x.rows; r += 32) {
      for (int64_t k = 0; k < 16; ++k) _mm512_store_si512(block + k * 16, row_pair(x, r + 2 * k, d));
      transpose_word_block(block, 16, reinterpret_cast<float*>(to + d * capacity + r), capacity / 2);
    }
}

// fp32 rows -> bf16: in pairs of rows, [column block of 16][pairs of padded_rows][16], rows up to a block of 32 zero;
// in rows, row_ld apart, columns up to a block of 32 zero. A product may read rows of garbage up to a multiple of 16, and
// makes rows of them that nobody reads.
template <bool kPairs, bool kRows>
void narrow_rows(const float* x, int64_t ld, int64_t rows, int64_t padded_rows, int64_t cols, int64_t row_ld,
                 uint16_t* pairs, uint16_t* in_rows) {
  const int64_t padded_cols = round_up(cols, 32);
  const auto put = [&](int64_t r, int64_t c, __m512 even, __m512 odd, __m512 next_even, __m512 next_odd) {
    const __m512i first = bf16_words(even, odd), second = bf16_words(next_even, next_odd);
    if constexpr (kPairs) {
      _mm512_storeu_si512(pairs + c * padded_rows + r * 16, in_pairs(first));
      _mm512_storeu_si512(pairs + (c + 16) * padded_rows + r * 16, in_pairs(second));
    }
    if constexpr (kRows) {
      _mm512_storeu_si512(in_rows + r * row_ld + c, _mm512_shuffle_i64x2(first, second, 0x44));
      _mm512_storeu_si512(in_rows + (r + 1) * row_ld + c, _mm512_shuffle_i64x2(first, second, 0xee));
    }
  };
  for (int64_t r = 0; r < round_up(rows, kPairs ? 32 : 2); r += 2) {
    const float *even = x + r * ld, *odd = even + ld;
    int64_t c = 0;
    for (; r + 2 <= rows && c + 32 <= cols; c += 32)
      put(r, c, _mm512_loadu_ps(even + c), _mm512_loadu_ps(odd + c), _mm512_loadu_ps(even + c + 16),
          _mm512_loadu_ps(odd + c + 16));
    const auto at = [&](int64_t row, int64_t col) {
      return row < rows ? float_word(x + row * ld, col, cols) : _mm512_setzero_ps();
    };
    for (; c < padded_cols; c += 32) put(r, c, at(r, c), at(r + 1, c), at(r, c + 16), at(r + 1, c + 16));
  }
}

}  // namespace
}  // namespace lam
