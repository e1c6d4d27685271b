// SIMD words of 16 floats (AVX-512 F, BW, DQ, VL).
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace lam {
namespace {

struct VecAvx512 {
  using T = float;
  static constexpr int W = 16;
  using reg = __m512;
  using mask = __mmask16;
  static constexpr int kRows = 6, kCols = 4;

  static reg set1(float x) { return _mm512_set1_ps(x); }
  static reg zero() { return _mm512_setzero_ps(); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, reg r) { _mm512_storeu_ps(p, r); }
  static mask from_bits(uint32_t bits) { return static_cast<mask>(bits); }
  static mask both(mask m, mask n) { return m & n; }
  static reg load(const float* p, mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static void store(float* p, reg r, mask m) { _mm512_mask_storeu_ps(p, m, r); }
  static reg select(mask m, reg x, reg y) { return _mm512_mask_blend_ps(m, y, x); }
  static reg keep(mask m, reg x) { return _mm512_maskz_mov_ps(m, x); }
  static mask not_equal(reg x, float y) { return _mm512_cmp_ps_mask(x, _mm512_set1_ps(y), _CMP_NEQ_UQ); }
  static reg add(reg x, reg y) { return _mm512_add_ps(x, y); }
  static reg sub(reg x, reg y) { return _mm512_sub_ps(x, y); }
  static reg mul(reg x, reg y) { return _mm512_mul_ps(x, y); }
  static reg div(reg x, reg y) { return _mm512_div_ps(x, y); }
  static reg fma(reg x, reg y, reg z) { return _mm512_fmadd_ps(x, y, z); }
  static reg max(reg x, reg y) { return _mm512_max_ps(x, y); }
  static float reduce_max(reg x) { return _mm512_reduce_max_ps(x); }
  static float reduce_add(reg x) { return _mm512_reduce_add_ps(x); }
  // 2^x, to about one rounding. Below 2^-126 the result is 0: a denormal would cost a microcode assist.
  static reg exp2(reg x) {
    const mask alive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_NLE_UQ);  // true for NaN, which must survive
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0x1.c72118p-13f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.461956p-10f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3d2800p-7f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c68500p-5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfd9ep-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42ap-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    return _mm512_maskz_scalef_ps(alive, p, x);
  }
  static reg from_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static reg from_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
};

}  // namespace
}  // namespace lam
