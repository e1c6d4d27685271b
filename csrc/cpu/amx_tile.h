// The eight AMX tile registers: 16 rows of 64 bytes. With LAM_EMULATE_AMX the same calls run in plain C++, so that the
// kernels built on them are tested on machines without AMX.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace lam {
namespace {

// Two words of 16 floats as bf16, nearest even, one after the other.
#ifdef LAM_EMULATE_AMX
inline __m512i bf16_bits(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, quiet);
}
inline __m512i bf16_words(__m512 first, __m512 second) {
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(bf16_bits(first)));
  return _mm512_inserti64x4(low, _mm512_cvtepi32_epi16(bf16_bits(second)), 1);
}
#else
inline __m512i bf16_words(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
#endif
// Lane by lane in pairs, as AMX wants its B.
inline __m512i in_pairs(__m512i words) {
  const __m512i even = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_permutexvar_epi16(_mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(16)), 16)), words);
}

#ifdef LAM_EMULATE_AMX

struct EmulatedTile {
  alignas(64) uint8_t row[16][64];
};
inline EmulatedTile* emulated_tiles() {
  static thread_local EmulatedTile tiles[8];
  return tiles;
}
inline void compiler_barrier(const void*) {}
inline void tiles_configure() {}
inline void tiles_release() {}
template <int N>
void tile_zero() {
  memset(emulated_tiles()[N].row, 0, sizeof(EmulatedTile));
}
template <int N>
void tile_load(const void* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r) memcpy(emulated_tiles()[N].row[r], static_cast<const char*>(p) + r * stride_bytes, 64);
}
template <int N>
void tile_store(void* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(p) + r * stride_bytes, emulated_tiles()[N].row[r], 64);
}
// C [16, 16] += A [16, 32] B, B as 16 rows of pairs
template <int C, int A, int B>
void tile_dot() {
  EmulatedTile* t = emulated_tiles();
  for (int m = 0; m < 16; ++m) {
    __m512 sum = _mm512_load_ps(t[C].row[m]);
    for (int k = 0; k < 16; ++k) {
      uint32_t pair;
      memcpy(&pair, t[A].row[m] + 4 * k, sizeof pair);
      const __m512i b = _mm512_load_si512(t[B].row[k]);
      const __m512 b0 = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
      const __m512 b1 = _mm512_castsi512_ps(_mm512_and_si512(b, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair << 16))), b0, sum);
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair & 0xffff0000u))), b1, sum);
    }
    _mm512_store_ps(t[C].row[m], sum);
  }
}

#else

// The compiler's tile intrinsics do not say what memory they read: stores before them must be told to happen.
inline void compiler_barrier(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

inline void tiles_configure() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) {
    config.bytes_per_row[t] = 64;
    config.rows[t] = 16;
  }
  compiler_barrier(&config);
  _tile_loadconfig(&config);
}
inline void tiles_release() { _tile_release(); }
// The intrinsics take the register's number as a literal.
#define LAM_TILE_CASES(N, CALL) \
  if constexpr (N == 0) CALL(0); else if constexpr (N == 1) CALL(1); else if constexpr (N == 2) CALL(2); \
  else if constexpr (N == 3) CALL(3); else if constexpr (N == 4) CALL(4); else if constexpr (N == 5) CALL(5); \
  else if constexpr (N == 6) CALL(6); else CALL(7)
#define LAM_TILE_ZERO(n) _tile_zero(n)
#define LAM_TILE_LOAD(n) _tile_loadd(n, p, stride_bytes)
#define LAM_TILE_STORE(n) _tile_stored(n, p, stride_bytes)
template <int N>
void tile_zero() {
  LAM_TILE_CASES(N, LAM_TILE_ZERO);
}
template <int N>
void tile_load(const void* p, int64_t stride_bytes) {
  LAM_TILE_CASES(N, LAM_TILE_LOAD);
}
template <int N>
void tile_store(void* p, int64_t stride_bytes) {
  LAM_TILE_CASES(N, LAM_TILE_STORE);
}
template <int C, int A, int B>
void tile_dot() {
  static_assert((C == 0 && A == 4 && B == 6) || (C == 1 && A == 4 && B == 7) || (C == 2 && A == 5 && B == 6) ||
                (C == 3 && A == 5 && B == 7));
  if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
  else if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
  else if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
  else _tile_dpbf16ps(3, 5, 7);
}

#endif

// fp32 sums in blocks of 16 x 16: rows of a block are ld apart, blocks row_step and col_step.
struct TileSums {
  float* data;
  int64_t ld, row_step, col_step;
};

// C [MI, NI] blocks (+)= A B over `depth` blocks of 32: A rows lda apart, its blocks step_a apart; each of the NI column
// blocks of B is blocks of 16 rows of pairs, step_b apart. All in elements.
template <int MI, int NI>
void amx_block(bool accumulate, int64_t depth, const uint16_t* A, int64_t lda, int64_t step_a, const uint16_t* B0,
               const uint16_t* B1, int64_t step_b, float* C00, int64_t ldc, int64_t row_step, int64_t col_step) {
  const int64_t c_bytes = ldc * 4, a_bytes = lda * 2;
  float *const C01 = C00 + col_step, *const C10 = C00 + row_step, *const C11 = C10 + col_step;
  if (accumulate) {
    tile_load<0>(C00, c_bytes);
    if constexpr (NI > 1) tile_load<1>(C01, c_bytes);
    if constexpr (MI > 1) tile_load<2>(C10, c_bytes);
    if constexpr (MI > 1 && NI > 1) tile_load<3>(C11, c_bytes);
  } else {
    tile_zero<0>();
    if constexpr (NI > 1) tile_zero<1>();
    if constexpr (MI > 1) tile_zero<2>();
    if constexpr (MI > 1 && NI > 1) tile_zero<3>();
  }
  for (int64_t k = 0; k < depth; ++k) {
    tile_load<4>(A + k * step_a, a_bytes);
    tile_load<6>(B0 + k * step_b, 64);
    tile_dot<0, 4, 6>();
    if constexpr (NI > 1) {
      tile_load<7>(B1 + k * step_b, 64);
      tile_dot<1, 4, 7>();
    }
    if constexpr (MI > 1) {
      tile_load<5>(A + 16 * lda + k * step_a, a_bytes);
      tile_dot<2, 5, 6>();
      if constexpr (NI > 1) tile_dot<3, 5, 7>();
    }
  }
  tile_store<0>(C00, c_bytes);
  if constexpr (NI > 1) tile_store<1>(C01, c_bytes);
  if constexpr (MI > 1) tile_store<2>(C10, c_bytes);
  if constexpr (MI > 1 && NI > 1) tile_store<3>(C11, c_bytes);
}

// C [row_blocks, col_blocks] blocks (+)= A B; column blocks of B are block_b apart.
inline void amx_gemm(bool accumulate, int64_t row_blocks, int64_t col_blocks, int64_t depth, const uint16_t* A,
                     int64_t lda, int64_t step_a, const uint16_t* B, int64_t block_b, int64_t step_b, const TileSums& C) {
  compiler_barrier(A);
  for (int64_t n = 0; n < col_blocks; n += 2) {
    const uint16_t *B0 = B + n * block_b, *B1 = B0 + block_b;
    for (int64_t m = 0; m < row_blocks; m += 2) {
      const uint16_t* Am = A + m * 16 * lda;
      float* Cm = C.data + m * C.row_step + n * C.col_step;
      const bool two_rows = m + 1 < row_blocks, two_cols = n + 1 < col_blocks;
      if (two_rows && two_cols) amx_block<2, 2>(accumulate, depth, Am, lda, step_a, B0, B1, step_b, Cm, C.ld, C.row_step, C.col_step);
      else if (two_rows) amx_block<2, 1>(accumulate, depth, Am, lda, step_a, B0, nullptr, step_b, Cm, C.ld, C.row_step, C.col_step);
      else if (two_cols) amx_block<1, 2>(accumulate, depth, Am, lda, step_a, B0, B1, step_b, Cm, C.ld, C.row_step, C.col_step);
      else amx_block<1, 1>(accumulate, depth, Am, lda, step_a, B0, nullptr, step_b, Cm, C.ld, C.row_step, C.col_step);
    }
  }
}

}  // namespace
}  // namespace lam
