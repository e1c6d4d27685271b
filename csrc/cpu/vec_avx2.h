// SIMD words of 8 floats (AVX2, FMA, F16C).
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace lam {
namespace {

struct VecAvx2 {
  using T = float;
  static constexpr int W = 8;
  using reg = __m256;
  using mask = __m256i;  // a lane is kept where its sign bit is set
  static constexpr int kRows = 6, kCols = 2;

  static reg set1(float x) { return _mm256_set1_ps(x); }
  static reg zero() { return _mm256_setzero_ps(); }
  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, reg r) { _mm256_storeu_ps(p, r); }
  static mask from_bits(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  }
  static mask both(mask m, mask n) { return _mm256_and_si256(m, n); }
  static reg load(const float* p, mask m) { return _mm256_maskload_ps(p, m); }
  static void store(float* p, reg r, mask m) { _mm256_maskstore_ps(p, m, r); }
  static reg select(mask m, reg x, reg y) { return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(m)); }
  static reg keep(mask m, reg x) { return _mm256_and_ps(_mm256_castsi256_ps(m), x); }
  static mask not_equal(reg x, float y) {
    return _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_set1_ps(y), _CMP_NEQ_UQ));
  }
  static reg add(reg x, reg y) { return _mm256_add_ps(x, y); }
  static reg sub(reg x, reg y) { return _mm256_sub_ps(x, y); }
  static reg mul(reg x, reg y) { return _mm256_mul_ps(x, y); }
  static reg div(reg x, reg y) { return _mm256_div_ps(x, y); }
  static reg fma(reg x, reg y, reg z) { return _mm256_fmadd_ps(x, y, z); }
  static reg max(reg x, reg y) { return _mm256_max_ps(x, y); }
  static float reduce_max(reg x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static float reduce_add(reg x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  // 2^x, to about one rounding. Below 2^-126 the result is 0: a denormal would cost a microcode assist.
  static reg exp2(reg x) {
    const __m256 alive = _mm256_cmp_ps(x, _mm256_set1_ps(-126.f), _CMP_NLE_UQ);  // true for NaN, which must survive
    const __m256 clamped = _mm256_blendv_ps(x, _mm256_set1_ps(128.f), _mm256_cmp_ps(x, _mm256_set1_ps(128.f), _CMP_GT_OQ));
    const __m256 n = _mm256_floor_ps(clamped);
    const __m256 f = _mm256_sub_ps(clamped, n);
    __m256 p = _mm256_set1_ps(0x1.c72118p-13f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.461956p-10f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.3d2800p-7f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.c68500p-5f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.ebfd9ep-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.62e42ap-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.f));
    // two factors, because 2^128 itself is no float while p * 2^127 * 2 is rightly inf
    const __m256i e = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(e, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256 s0 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 s1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23));
    return _mm256_and_ps(alive, _mm256_mul_ps(_mm256_mul_ps(p, s0), s1));
  }
  static reg from_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static reg from_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
};

}  // namespace
}  // namespace lam
