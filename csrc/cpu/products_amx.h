// The matrix products of attention on AMX tiles: bf16 operands, fp32 sums.
//
// AMX multiplies row-major A by B stored as pairs of rows. Scores take A = q and B = k in pairs along the head dimension;
// dv and dk are formed transposed, A = grad_out^T or q^T, so that P and dS need only be interleaved in pairs of rows.
#pragma once
#include <cstdint>
#include <cstring>

#include "amx_tile.h"
#include "arena.h"
#include "products_fma.h"
#include "vec_avx512.h"

namespace lam {
namespace {

class AmxProducts {
 public:
  using Word = VecAvx512;
  using T = float;
  static constexpr int64_t kRowMultiple = 32, kColMultiple = 32;
  static constexpr bool kAnyRows = false;

  static Blocking blocking(bool narrow, bool backward) {
    if (narrow) return {384, 1024, 64, 256};
    return {384, 512, 128, backward ? 128 : 256};
  }

  AmxProducts(const MaskedAttentionParams& p, const Blocking& s, bool backward, Arena& arena)
      : p_(p), depth_(round_up(p.D, 32)), width_(round_up(p.Dv, 32)) {
    if (arena.base != nullptr) tiles_configure(), configured_ = true;
    // a pack may be read up to one block of 32 rows or columns past the region
    rows_ = s.region_rows + 32;
    cols_ = s.region_cols + 32;
    key_pairs_ = arena.take<uint16_t>(cols_ * depth_);
    query_ = arena.take<uint16_t>(rows_ * depth_);
    weights_ = arena.take<uint16_t>(s.tile_rows * (s.tile_cols + 32));
    if (!backward) {
      value_rows_ = arena.take<uint16_t>(cols_ * round_up(p.Dv, 16));
      return;
    }
    value_pairs_ = arena.take<uint16_t>(cols_ * width_);
    key_rows_ = arena.take<uint16_t>(cols_ * depth_);
    query_t_ = arena.take<uint16_t>(rows_ * depth_);
    grad_out_ = take_grad_out(s, arena);
    weight_pairs_ = arena.take<uint16_t>(s.tile_rows * (s.tile_cols + 32));
    score_grad_pairs_ = arena.take<uint16_t>(s.tile_rows * (s.tile_cols + 32));
    dq_ = arena.take<float>(rows_ * depth_);
    dk_t_ = arena.take<float>(cols_ * depth_);
    dv_t_ = arena.take<float>(cols_ * width_);
  }
  ~AmxProducts() {
    if (configured_) tiles_release();
  }
  AmxProducts(const AmxProducts&) = delete;
  AmxProducts& operator=(const AmxProducts&) = delete;

  void enter_keys(const Region& region, int64_t b, int64_t hk, bool) {
    region_ = region;
    const Source key = source(p_.key, region.j0, region.cols, b, hk, p_.D);
    const Source value = source(p_.value, region.j0, region.cols, b, hk, p_.Dv);
    pack_along_width(key, depth_, key_pairs_);
    if (value_pairs_ != nullptr) pack_along_width(value, width_, value_pairs_);
    if (value_rows_ != nullptr) pack_along_rows(value, cols_, value_rows_);
    if (key_rows_ != nullptr) pack_along_rows(key, cols_, key_rows_);
  }
  void enter_queries(const Region& region, int64_t b, int64_t h) {
    region_ = region;
    const Source query = source(p_.query, region.i0, region.rows, b, h, p_.D);
    copy_rows(query, depth_, query_);
    if (query_t_ != nullptr) pack_transposed_rows(query, query_t_);
  }
  void enter_grad_out(int64_t b, int64_t h) { enter_grad_out(grad_out_, p_.grad_out, b, h); }

  // A second result of the same rows has a gradient of its own; weight_grads and accumulate use the one swapped in.
  struct GradOut {
    uint16_t *rows = nullptr, *transposed = nullptr;
  };
  GradOut take_grad_out(const Blocking&, Arena& arena) const {
    uint16_t* rows = arena.take<uint16_t>(rows_ * width_);
    return {rows, arena.take<uint16_t>(rows_ * width_)};
  }
  void enter_grad_out(GradOut& other, const View& view, int64_t b, int64_t h) const {
    const Source grad_out = source(view, region_.i0, region_.rows, b, h, p_.Dv);
    copy_rows(grad_out, width_, other.rows);
    pack_transposed_rows(grad_out, other.transposed);
  }
  void swap_grad_out(GradOut& other) {
    const GradOut mine = grad_out_;
    grad_out_ = other;
    other = mine;
  }

  void scores(int64_t r0, int64_t rows, int64_t lo, int64_t words, float* C, int64_t ldc) const {
    amx_gemm(false, ceil_div(rows, 16), words, depth_ / 32, query_ + r0 * depth_, depth_, 32, key_pairs_ + lo * depth_,
             16 * depth_, 512, C, ldc);
  }
  void weight_grads(int64_t r0, int64_t rows, int64_t lo, int64_t words, float* C, int64_t ldc) const {
    amx_gemm(false, ceil_div(rows, 16), words, width_ / 32, grad_out_.rows + r0 * width_, width_, 32,
             value_pairs_ + lo * width_, 16 * width_, 512, C, ldc);
  }

  // Rows of `out` up to a multiple of 16 are written.
  void weigh_values(bool first, int64_t rows, int64_t lo, int64_t cols, const float* P, int64_t ldp, float* out,
                    int64_t ld) {
    const int64_t padded = round_up(cols, 32);
    for (int64_t r = 0; r < rows; ++r) {
      uint16_t* to = weights_ + r * padded;
      for (int64_t c = 0; c < padded; c += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), bf16_row(word(P + r * ldp, c, cols)));
    }
    amx_gemm(!first, ceil_div(rows, 16), ceil_div(p_.Dv, 16), padded / 32, weights_, padded, 32, value_rows_ + lo * 16,
             cols_ * 16, 512, out, ld);
  }

  // Gradients of keys are summed over the region transposed, those of queries in rows of their own, and go where they
  // belong when the pair or the head is left.
  void open_pair() {
    memset(dk_t_, 0, static_cast<size_t>(cols_ * depth_) * sizeof(float));
    memset(dv_t_, 0, static_cast<size_t>(cols_ * width_) * sizeof(float));
  }
  void open_head() { memset(dq_, 0, static_cast<size_t>(rows_ * depth_) * sizeof(float)); }
  void close_pair(Rows<float> dk, Rows<float> dv, bool store) {
    if (dk.data != nullptr) add_transposed(dk_t_, p_.D, dk, store);
    if (dv.data != nullptr) add_transposed(dv_t_, p_.Dv, dv, store);
  }
  void close_head(Rows<float> dq, bool store) {
    if (dq.data == nullptr) return;
    for (int64_t r = 0; r < region_.rows; ++r) {
      float* to = dq.data + region_.i(r) * dq.ld;
      for (int64_t d = 0; d < p_.D; ++d) to[d] = (store ? 0.f : to[d]) + dq_[r * depth_ + d];
    }
  }

  void accumulate(int64_t r0, int64_t rows, int64_t lo, int64_t cols, const float* P, const float* dS, int64_t ld,
                  Rows<float> dq, Rows<float> dk, Rows<float> dv, bool, bool) {
    const int64_t words = ceil_div(cols, 16), padded_rows = round_up(rows, 32), padded_cols = round_up(cols, 32);
    if (dv.data != nullptr) {
      interleave(P, ld, rows, padded_rows, cols, weight_pairs_);
      amx_gemm(true, ceil_div(p_.Dv, 16), words, padded_rows / 32, grad_out_.transposed + r0, rows_, 32, weight_pairs_,
               padded_rows * 16, 512, dv_t_ + lo, cols_);
    }
    if (dk.data != nullptr) {
      interleave(dS, ld, rows, padded_rows, cols, score_grad_pairs_);
      amx_gemm(true, ceil_div(p_.D, 16), words, padded_rows / 32, query_t_ + r0, rows_, 32, score_grad_pairs_,
               padded_rows * 16, 512, dk_t_ + lo, cols_);
    }
    if (dq.data != nullptr) {
      for (int64_t r = 0; r < round_up(rows, 16); ++r)
        for (int64_t c = 0; c < padded_cols; c += 16)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights_ + r * padded_cols + c),
                              bf16_row(r < rows ? word(dS + r * ld, c, cols) : _mm512_setzero_ps()));
      amx_gemm(true, ceil_div(rows, 16), ceil_div(p_.D, 16), padded_cols / 32, weights_, padded_cols, 32,
               key_rows_ + lo * 16, cols_ * 16, 512, dq_ + r0 * depth_, depth_);
    }
  }

 private:
  // Rows of bf16 in the caller's memory.
  struct Source {
    const uint16_t* data;
    int64_t ld, rows, width;
    const uint16_t* row(int64_t r) const { return data + r * ld; }
  };
  Source source(const View& v, int64_t first, int64_t rows, int64_t b, int64_t h, int64_t width) const {
    return {reinterpret_cast<const uint16_t*>(at(v, head_offset(v, b, h) + first * v.stride[2])),
            v.stride[2] * region_.step, rows, width};
  }

  static __m512 word(const float* row, int64_t c, int64_t cols) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(low_bits(min64(16, cols - c))), row + c);
  }
  static __m256i half_word(const Source& x, int64_t r, int64_t d) {
    if (r >= x.rows || d >= x.width) return _mm256_setzero_si256();
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(low_bits(min64(16, x.width - d))), x.row(r) + d);
  }
  static __m512i interleave_halves(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }

  void copy_rows(const Source& x, int64_t padded, uint16_t* to) const {
    for (int64_t r = 0; r < round_up(x.rows, 32); ++r)
      for (int64_t d = 0; d < padded; d += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * padded + d), half_word(x, r, d));
  }

  // [row block of 16][width block of 32][16 pairs along the width][16 rows]
  void pack_along_width(const Source& x, int64_t padded, uint16_t* to) const {
    alignas(64) float block[16 * 16];
    for (int64_t r = 0; r < round_up(x.rows, 32); r += 16)
      for (int64_t d = 0; d < padded; d += 32) {
        for (int64_t k = 0; k < 16; ++k) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(block + k * 16), half_word(x, r + k, d));
          _mm256_store_si256(reinterpret_cast<__m256i*>(block + k * 16 + 8), half_word(x, r + k, d + 16));
        }
        transpose_word_block(block, 16, reinterpret_cast<float*>(to + r * padded + d * 16), 16);
      }
  }

  // [width block of 16][pairs of rows, of `capacity` rows][16]
  static void pack_along_rows(const Source& x, int64_t capacity, uint16_t* to) {
    for (int64_t d = 0; d < x.width; d += 16)
      for (int64_t r = 0; r < capacity; r += 2)
        _mm512_storeu_si512(to + d * capacity + r * 16, interleave_halves(half_word(x, r, d), half_word(x, r + 1, d)));
  }

  // [width][rows_], rows beyond the region zero
  void pack_transposed_rows(const Source& x, uint16_t* to) const {
    alignas(64) float block[16 * 16];
    for (int64_t d = 0; d < x.width; d += 16)
      for (int64_t r = 0; r < rows_; r += 32) {
        for (int64_t k = 0; k < 16; ++k)
          _mm512_store_si512(block + k * 16, interleave_halves(half_word(x, r + 2 * k, d), half_word(x, r + 2 * k + 1, d)));
        transpose_word_block(block, 16, reinterpret_cast<float*>(to + d * rows_ + r), rows_ / 2);
      }
  }

  // fp32 rows -> [column block of 16][pairs of rows][16], rows beyond the tile zero
  static void interleave(const float* x, int64_t ld, int64_t rows, int64_t padded_rows, int64_t cols, uint16_t* to) {
    for (int64_t c = 0; c < cols; c += 16)
      for (int64_t r = 0; r < padded_rows; r += 2) {
        const __m512 even = r < rows ? word(x + r * ld, c, cols) : _mm512_setzero_ps();
        const __m512 odd = r + 1 < rows ? word(x + (r + 1) * ld, c, cols) : _mm512_setzero_ps();
        _mm512_storeu_si512(to + c * padded_rows + r * 16, bf16_pairs(even, odd));
      }
  }

  void add_transposed(const float* sum_t, int64_t width, Rows<float> to, bool store) const {
    alignas(64) float block[16 * 16];
    for (int64_t c = 0; c < region_.cols; c += 16)
      for (int64_t d = 0; d < width; d += 16) {
        transpose_word_block(sum_t + d * cols_ + c, cols_, block, 16);
        for (int64_t k = 0; k < min64(16, region_.cols - c); ++k) {
          float* row = to.data + region_.j(c + k) * to.ld + d;
          for (int64_t e = 0; e < min64(16, width - d); ++e) row[e] = (store ? 0.f : row[e]) + block[k * 16 + e];
        }
      }
  }

  const MaskedAttentionParams& p_;
  bool configured_ = false;
  int64_t depth_, width_, rows_, cols_;
  uint16_t *key_pairs_, *query_, *weights_, *value_rows_ = nullptr;
  uint16_t *value_pairs_ = nullptr, *key_rows_ = nullptr, *query_t_ = nullptr, *weight_pairs_ = nullptr, *score_grad_pairs_ = nullptr;
  float *dq_ = nullptr, *dk_t_ = nullptr, *dv_t_ = nullptr;
  GradOut grad_out_;
  Region region_{};
};

}  // namespace
}  // namespace lam
