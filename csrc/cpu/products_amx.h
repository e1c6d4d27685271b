// The matrix products of attention on AMX tiles: bf16 operands, fp32 sums.
//
// AMX multiplies row-major A by B stored as pairs of rows. Scores take A = q and B = k in pairs along the head dimension;
// dv and dk are formed transposed, A = grad_out^T or q^T, so that P and dS need only be interleaved in pairs of rows.
// The products take so little time that scores must not leave the first-level cache: a tile is worked on in strips of
// rows, and only what the next products need of them, in bf16, is kept for the whole tile.
#pragma once
#include <cstdint>
#include <cstring>

#include "amx_packs.h"
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
  static constexpr int64_t kStripRows = 32;
  static constexpr bool kOwnSums = true;  // gradients are summed over the region, and then go where they belong

  static Blocking blocking(bool narrow, bool backward) {
    if (narrow) return {384, 1024, 64, 256};
    return {384, 512, 128, backward ? 128 : 256};
  }

  AmxProducts(const MaskedAttentionParams& p, const Blocking& s, bool backward, Arena& arena)
      : p_(p), depth_(round_up(p.D, 32)), width_(round_up(p.Dv, 32)) {
    if (arena.base != nullptr) tiles_configure(), configured_ = true;
    // of a full region no power of two, or all rows of a transposed pack would meet in few sets of the cache
    rows_ = s.region_rows + 32;
    cols_ = s.region_cols + 32;  // packs are read up to a block of 32 columns past the region
    key_pairs_ = arena.take<uint16_t>(cols_ * depth_);
    query_ = arena.take<uint16_t>(rows_ * depth_);
    weights_ = arena.take<uint16_t>(s.tile_rows * s.tile_cols);
    if (!backward) {
      value_rows_ = arena.take<uint16_t>(cols_ * round_up(p.Dv, 16));
      return;
    }
    value_pairs_ = arena.take<uint16_t>(cols_ * width_);
    key_rows_ = arena.take<uint16_t>(cols_ * depth_);
    query_t_ = arena.take<uint16_t>(rows_ * depth_);
    grad_out_ = take_grad_out(s, arena);
    weight_pairs_ = arena.take<uint16_t>(s.tile_rows * s.tile_cols);
    score_grad_pairs_ = arena.take<uint16_t>(s.tile_rows * s.tile_cols);
    dq_ = {arena.take<float>(s.region_rows * round_up(p.D, 16)), ceil_div(p.D, 16)};
    dk_t_ = {arena.take<float>(s.region_cols * round_up(p.D, 16)), ceil_div(p.D, 16)};
    dv_t_ = {arena.take<float>(s.region_cols * round_up(p.Dv, 16)), ceil_div(p.Dv, 16)};
  }
  ~AmxProducts() {
    if (configured_) tiles_release();
  }
  AmxProducts(const AmxProducts&) = delete;
  AmxProducts& operator=(const AmxProducts&) = delete;

  void enter_keys(const Region& region, int64_t b, int64_t hk, bool) {
    region_ = region;
    const Bf16Rows key = source(p_.key, region.j0, region.cols, b, hk, p_.D);
    const Bf16Rows value = source(p_.value, region.j0, region.cols, b, hk, p_.Dv);
    pack_along_width(key, depth_, key_pairs_);
    if (value_pairs_ != nullptr) pack_along_width(value, width_, value_pairs_);
    if (value_rows_ != nullptr) pack_along_rows(value, cols_, value_rows_);
    if (key_rows_ != nullptr) pack_along_rows(key, cols_, key_rows_);
  }
  void enter_queries(const Region& region, int64_t b, int64_t h) {
    region_ = region;
    const Bf16Rows query = source(p_.query, region.i0, region.rows, b, h, p_.D);
    copy_rows(query, depth_, query_);
    if (query_t_ != nullptr) pack_transposed_rows(query, rows_, query_t_);
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
    const Bf16Rows grad_out = source(view, region_.i0, region_.rows, b, h, p_.Dv);
    copy_rows(grad_out, width_, other.rows);
    pack_transposed_rows(grad_out, rows_, other.transposed);
  }
  void swap_grad_out(GradOut& other) {
    const GradOut mine = grad_out_;
    grad_out_ = other;
    other = mine;
  }

  void scores(int64_t r0, int64_t rows, int64_t lo, int64_t words, float* C, int64_t ldc) const {
    amx_gemm(false, ceil_div(rows, 16), words, depth_ / 32, query_ + r0 * depth_, depth_, 32, key_pairs_ + lo * depth_,
             16 * depth_, 512, in_rows(C, ldc));
  }
  void weight_grads(int64_t r0, int64_t rows, int64_t lo, int64_t words, float* C, int64_t ldc) const {
    amx_gemm(false, ceil_div(rows, 16), words, width_ / 32, grad_out_.rows + r0 * width_, width_, 32,
             value_pairs_ + lo * width_, 16 * width_, 512, in_rows(C, ldc));
  }

  // A strip of a tile's weights, whose products come once the tile has them all; the strip's other columns are zero.
  void take_weights(const Strip& strip, int64_t tile_cols, const float* P, int64_t ld) {
    take<false, true>(P, ld, strip, 0, round_up(tile_cols, 32), nullptr, weights_);
  }
  // Rows of `out` up to a multiple of 16 are written.
  void weigh_values(bool first, int64_t rows, int64_t lo, int64_t cols, float* out, int64_t ld) {
    const int64_t padded = round_up(cols, 32);
    amx_gemm(!first, ceil_div(rows, 16), ceil_div(p_.Dv, 16), padded / 32, weights_, padded, 32, value_rows_ + lo * 16,
             cols_ * 16, 512, in_rows(out, ld));
  }

  // Gradients are summed in blocks, those of keys transposed.
  void open_pair(bool) { dk_t_.opened = dv_t_.opened = 0; }
  void open_head() { dq_.opened = 0; }
  // Rows that are complete go to the caller's tensor, others to sums.
  void close_pair(int64_t b, int64_t hk, Rows<float> dk, Rows<float> dv, Share share) {
    if (p_.grad_key.data != nullptr) settle_transposed(dk_t_, p_.D, destination(p_.grad_key, b, hk, region_.j0, dk), share);
    if (p_.grad_value.data != nullptr) settle_transposed(dv_t_, p_.Dv, destination(p_.grad_value, b, hk, region_.j0, dv), share);
  }
  void close_head(int64_t b, int64_t h, Rows<float> dq, Share share) {
    if (p_.grad_query.data == nullptr) return;
    const Destination to = destination(p_.grad_query, b, h, region_.i0, dq);
    dq_.clear_until(ceil_div(region_.rows, 16));
    for (int64_t r = 0; r < region_.rows; ++r) {
      const float* row = dq_.of(r / 16) + r % 16 * 16;
      if (r >= share.met && r < share.complete)
        for (int64_t d = 0; d < p_.D; d += 32) {
          const __m512 next = d + 16 < p_.D ? _mm512_loadu_ps(row + (d + 16) * 16) : _mm512_setzero_ps();
          write(bf16_words(_mm512_loadu_ps(row + d * 16), next), to.grad + r * to.grad_ld + d, p_.D - d);
        }
      else
        for (int64_t d = 0; d < p_.D; d += 16) settle(_mm512_loadu_ps(row + d * 16), r, d, p_.D, to, share);
    }
  }

  // Weights and gradients of the scores of a strip, for the gradients that are wanted.
  void take_slopes(const Strip& strip, int64_t tile_rows, int64_t tile_cols, const float* P, const float* dS, int64_t ld,
                   Wanted wanted) {
    const int64_t rows = round_up(tile_rows, 32), cols = round_up(tile_cols, 32);
    if (wanted.value) take<true, false>(P, ld, strip, rows, cols, weight_pairs_, nullptr);
    if (wanted.key && wanted.query) take<true, true>(dS, ld, strip, rows, cols, score_grad_pairs_, weights_);
    else if (wanted.key) take<true, false>(dS, ld, strip, rows, cols, score_grad_pairs_, nullptr);
    else if (wanted.query) take<false, true>(dS, ld, strip, rows, cols, nullptr, weights_);
  }
  void accumulate(int64_t r0, int64_t rows, int64_t lo, int64_t cols, Wanted wanted, Rows<float>, Rows<float>,
                  Rows<float>, bool, bool) {
    const int64_t words = ceil_div(cols, 16), padded_rows = round_up(rows, 32), padded_cols = round_up(cols, 32);
    const int64_t D = dq_.width, Dv = dv_t_.width;
    if (wanted.value) {
      const bool add = dv_t_.open(lo / 16, words);
      amx_gemm(add, Dv, words, padded_rows / 32, grad_out_.transposed + r0, rows_, 32, weight_pairs_, padded_rows * 16, 512,
               {dv_t_.of(lo / 16), 16, 256, 256 * Dv});
    }
    if (wanted.key) {
      const bool add = dk_t_.open(lo / 16, words);
      amx_gemm(add, D, words, padded_rows / 32, query_t_ + r0, rows_, 32, score_grad_pairs_, padded_rows * 16, 512,
               {dk_t_.of(lo / 16), 16, 256, 256 * D});
    }
    if (wanted.query) {
      const bool add = dq_.open(r0 / 16, ceil_div(rows, 16));
      amx_gemm(add, ceil_div(rows, 16), D, padded_cols / 32, weights_, padded_cols, 32, key_rows_ + lo * 16, cols_ * 16, 512,
               {dq_.of(r0 / 16), 16, 256 * D, 256});
    }
  }

 private:
  // Sums of 16 rows or columns of a region after another, in blocks of 16 x 16 along the width. What was not met yet
  // holds nothing.
  struct Sums {
    float* data = nullptr;
    int64_t width = 0, opened = 0;  // blocks of 16

    float* of(int64_t block) const { return data + block * width * 256; }
    // Makes blocks [first, first + count) ready for a product: to add to, or, if false, to be overwritten by it.
    bool open(int64_t first, int64_t count) {
      if (first + count <= opened) return true;
      const bool add = first < opened;
      clear_until(add ? first + count : first);
      opened = first + count;
      return add;
    }
    void clear_until(int64_t block) {
      if (block > opened) memset(of(opened), 0, static_cast<size_t>((block - opened) * width * 256) * sizeof(float));
      opened = max64(opened, block);
    }
  };

  Bf16Rows source(const View& v, int64_t first, int64_t rows, int64_t b, int64_t h, int64_t width) const {
    return {reinterpret_cast<const uint16_t*>(at(v, head_offset(v, b, h) + first * v.stride[2])),
            v.stride[2] * region_.step, rows, width};
  }

  // A strip in bf16, in a tile of padded_rows by padded_cols.
  template <bool kPairs, bool kRows>
  static void take(const float* x, int64_t ld, const Strip& strip, int64_t padded_rows, int64_t padded_cols, uint16_t* pairs,
                   uint16_t* rows) {
    const int64_t end = strip.col + round_up(strip.cols, 32);
    uint16_t* const pairs_to = kPairs ? pairs + strip.row * 16 : nullptr;
    uint16_t* const rows_to = kRows ? rows + strip.row * padded_cols : nullptr;
    narrow_rows<kPairs, kRows>(x, ld, strip.rows, padded_rows, strip.cols, padded_cols,
                               kPairs ? pairs_to + strip.col * padded_rows : nullptr, kRows ? rows_to + strip.col : nullptr);
    const auto clear = [&](int64_t first, int64_t last) {
      if constexpr (kPairs)
        for (int64_t c = first; c < last; c += 16)
          memset(pairs_to + c * padded_rows, 0, static_cast<size_t>(round_up(strip.rows, 32) * 16) * sizeof(uint16_t));
      if constexpr (kRows)
        for (int64_t r = 0; r < strip.rows; ++r)
          for (int64_t c = first; c < last; c += 32)
            _mm512_storeu_si512(rows_to + r * padded_cols + c, _mm512_setzero_si512());
    };
    clear(0, strip.col);
    clear(end, padded_cols);
  }

  static TileSums in_rows(float* C, int64_t ld) { return {C, ld, 16 * ld, 16}; }

  // Where the rows of a region's gradient go.
  struct Destination {
    float* sums;
    int64_t sums_ld;
    uint16_t* grad;
    int64_t grad_ld;
  };
  Destination destination(const View& grad, int64_t b, int64_t h, int64_t first, Rows<float> sums) const {
    return {sums.data == nullptr ? nullptr : sums.row(first), sums.ld * region_.step,
            reinterpret_cast<uint16_t*>(at_mutable(grad, head_offset(grad, b, h) + first * grad.stride[2])),
            grad.stride[2] * region_.step};
  }

  // Elements [d, d + 16) of row r.
  static void settle(__m512 x, int64_t r, int64_t d, int64_t width, const Destination& to, Share share) {
    const __mmask16 inside = static_cast<__mmask16>(low_bits(width - d));
    if (r < share.met) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(inside, to.sums + r * to.sums_ld + d));
    if (r >= share.complete) return _mm512_mask_storeu_ps(to.sums + r * to.sums_ld + d, inside, x);
    _mm256_mask_storeu_epi16(to.grad + r * to.grad_ld + d, inside, _mm512_castsi512_si256(bf16_words(x, x)));
  }
  // to[0, min(32, left)) = words
  static void write(__m512i words, uint16_t* to, int64_t left) {
    _mm512_mask_storeu_epi16(to, static_cast<__mmask32>(low_bits(min64(32, left))), words);
  }
  void settle_transposed(Sums& from, int64_t width, const Destination& to, Share share) const {
    from.clear_until(ceil_div(region_.cols, 16));
    const float* sum_t = from.data;
    alignas(64) float block[16 * 16];
    for (int64_t c = 0; c < region_.cols; c += 16, sum_t += 256 * from.width) {
      const int64_t rows = min64(16, region_.cols - c);
      if (c >= share.met && c + rows <= share.complete) {
        write_transposed(sum_t, width, rows, to.grad + c * to.grad_ld, to.grad_ld);
        continue;
      }
      for (int64_t r = c + 16; r < min64(c + 32, share.met); ++r)  // sums of the next block, called for early
        for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(to.sums + r * to.sums_ld + d, 1);
      for (int64_t d = 0; d < width; d += 16) {
        transpose_word_block(sum_t + d * 16, 16, block, 16);
        for (int64_t k = 0; k < rows; ++k) settle(_mm512_load_ps(block + k * 16), c + k, d, width, to, share);
      }
    }
  }
  // Up to 16 rows out of transposed sums that are all there is of them: in pairs, to transpose half as much.
  static void write_transposed(const float* sum_t, int64_t width, int64_t rows, uint16_t* to, int64_t ld) {
    alignas(64) float pairs[16 * 16], block[16 * 16];
    for (int64_t d = 0; d < width; d += 32) {
      const int64_t blocks = d + 16 < width ? 16 : 8;
      for (int64_t k = 0; k < 16; ++k) {
        const float* even = sum_t + (d + 2 * k) * 16;
        const __m512i words = k < blocks ? in_pairs(bf16_words(_mm512_loadu_ps(even), _mm512_loadu_ps(even + 16)))
                                         : _mm512_setzero_si512();
        _mm512_store_si512(pairs + k * 16, words);
      }
      transpose_word_block(pairs, 16, block, 16);
      for (int64_t k = 0; k < rows; ++k) write(_mm512_load_si512(block + k * 16), to + k * ld + d, width - d);
    }
  }

  const MaskedAttentionParams& p_;
  bool configured_ = false;
  int64_t depth_, width_, rows_, cols_;
  uint16_t *key_pairs_, *query_, *weights_, *value_rows_ = nullptr;
  uint16_t *value_pairs_ = nullptr, *key_rows_ = nullptr, *query_t_ = nullptr;
  uint16_t *weight_pairs_ = nullptr, *score_grad_pairs_ = nullptr;
  Sums dq_, dk_t_, dv_t_;
  GradOut grad_out_;
  Region region_{};
};

}  // namespace
}  // namespace lam
