// The matrix products of attention in fused multiply-adds of the kernel's number type.
#pragma once
#include <cstdint>

#include "arena.h"
#include "gemm.h"
#include "rows.h"
#include "schedule.h"
#include "visibility.h"

namespace lam {
namespace {

inline int64_t head_offset(const View& v, int64_t b, int64_t h) { return b * v.stride[0] + h * v.stride[1]; }

// Tile and region sizes of one call.
struct Blocking {
  int64_t region_rows, region_cols;
  int64_t tile_rows, tile_cols;
  int64_t short_rows = 0;  // rows of a tile of a head that sees few keys beside heads that see many
};

constexpr int64_t kWholeTile = int64_t{1} << 30;  // rows of a strip that is all of a tile

// Rows and columns of a tile.
struct Strip {
  int64_t row, rows, col, cols;
};

// Whose gradients are wanted.
struct Wanted {
  bool query, key, value;
};

template <class V>
class FmaProducts {
 public:
  using Word = V;
  using T = typename V::T;
  static constexpr int64_t kRowMultiple = V::kRows, kColMultiple = V::W * V::kCols;
  static constexpr bool kAnyRows = true;  // tiles need not have a multiple of rows, it is only faster
  static constexpr int64_t kStripRows = kWholeTile;
  static constexpr bool kOwnSums = false;  // gradients are added to where they belong at once

  static Blocking blocking(bool narrow, bool backward) {
    // narrow patterns see few keys a row: short tiles waste fewer of them on hidden pairs
    if (narrow) return {192, 512, 4 * V::kRows, 256};
    return {320, 512, 12 * V::kRows, backward ? 128 : 320};
  }

  FmaProducts(const MaskedAttentionParams& p, const Blocking& s, bool backward, Arena& arena)
      : p_(p), width_(round_up(p.Dv, V::W)) {
    const bool staged = !in_place<V>(p.query.dtype);
    const int64_t depth = round_up(p.D, V::W);
    key_panels_ = arena.take<T>(panel_elements<V>(s.region_cols, p.D));
    value_panels_ = arena.take<T>(backward ? panel_elements<V>(s.region_cols, p.Dv) : 0);
    key_buffer_ = arena.take<T>(staged ? s.region_cols * depth : 0);
    value_buffer_ = arena.take<T>(staged ? s.region_cols * width_ : 0);
    query_buffer_ = arena.take<T>(staged ? s.region_rows * depth : 0);
    grad_out_.buffer = arena.take<T>(staged && backward ? s.region_rows * width_ : 0);
  }

  void enter_keys(const Region& region, int64_t b, int64_t hk, bool want_values_panels) {
    region_ = region;
    key_ = stage(p_.key, region.j0, region.cols, b, hk, p_.D, key_buffer_);
    value_ = stage(p_.value, region.j0, region.cols, b, hk, p_.Dv, value_buffer_);
    pack_transposed<V>(key_, region.cols, p_.D, key_panels_);
    if (want_values_panels) pack_transposed<V>(value_, region.cols, p_.Dv, value_panels_);
  }
  void enter_queries(const Region& region, int64_t b, int64_t h) {
    region_ = region;
    query_ = stage(p_.query, region.i0, region.rows, b, h, p_.D, query_buffer_);
  }
  void enter_grad_out(int64_t b, int64_t h) {
    grad_out_.rows = stage(p_.grad_out, region_.i0, region_.rows, b, h, p_.Dv, grad_out_.buffer);
  }

  // A second result of the same rows has a gradient of its own; weight_grads and accumulate use the one swapped in.
  struct GradOut {
    Rows<T> rows;
    T* buffer;
  };
  GradOut take_grad_out(const Blocking& s, Arena& arena) const {
    return {{}, arena.take<T>(in_place<V>(p_.query.dtype) ? 0 : s.region_rows * width_)};
  }
  void enter_grad_out(GradOut& other, const View& grad_out, int64_t b, int64_t h) const {
    other.rows = stage(grad_out, region_.i0, region_.rows, b, h, p_.Dv, other.buffer);
  }
  void swap_grad_out(GradOut& other) {
    const GradOut mine = grad_out_;
    grad_out_ = other;
    other = mine;
  }

  // C [rows, words] = q . k of tile rows [r0, r0 + rows) and columns from lo
  void scores(int64_t r0, int64_t rows, int64_t lo, int64_t words, T* C, int64_t ldc) const {
    gemm<V, false, false, true>(rows, words * V::W, p_.D, query_.data + r0 * query_.ld, query_.ld, key_panels_ + lo * p_.D,
                                p_.D * V::W, C, ldc);
  }
  // C [rows, words] = grad_out . v
  void weight_grads(int64_t r0, int64_t rows, int64_t lo, int64_t words, T* C, int64_t ldc) const {
    gemm<V, false, false, true>(rows, words * V::W, p_.Dv, grad_out_.rows.data + r0 * grad_out_.rows.ld, grad_out_.rows.ld,
                                value_panels_ + lo * p_.Dv, p_.Dv * V::W, C, ldc);
  }

  // out [rows, Dv] (+)= P v of the weights taken
  void take_weights(const Strip&, int64_t, const T* P, int64_t ld) { weights_ = P, ld_ = ld; }
  void weigh_values(bool first, int64_t rows, int64_t lo, int64_t cols, T* out, int64_t ld) {
    product<false>(first, rows, p_.Dv, cols, weights_, ld_, value_.data + lo * value_.ld, value_.ld, out, ld);
  }

  // `stored`: a gradient's rows are stored by the first tile that meets them.
  void open_pair(bool stored) { stored_ = stored; }
  void close_pair(int64_t, int64_t, Rows<T>, Rows<T>, Share) {}
  void open_head() {}
  void close_head(int64_t, int64_t, Rows<T>, Share) {}

  // dv += P^T grad_out, dk += dS^T q, dq += dS k of the weights and gradients taken, each where wanted; = instead of +=
  // where its rows are stored and this tile is the first to come
  void take_slopes(const Strip&, int64_t, int64_t, const T* P, const T* dS, int64_t ld, Wanted) {
    weights_ = P, slopes_ = dS, ld_ = ld;
  }
  void accumulate(int64_t r0, int64_t rows, int64_t lo, int64_t cols, Wanted wanted, Rows<T> dq, Rows<T> dk, Rows<T> dv,
                  bool first_of_rows, bool first_of_cols) {
    const int64_t j = region_.j(lo), i = region_.i(r0), step = region_.step;
    const T *q = query_.row(r0), *go = grad_out_.rows.row(r0);
    const bool store_rows = stored_ && first_of_rows, store_cols = stored_ && first_of_cols;
    if (wanted.value)
      product<true>(store_cols, cols, p_.Dv, rows, weights_, ld_, go, grad_out_.rows.ld, dv.row(j), dv.ld * step);
    if (wanted.key)
      product<true>(store_cols, cols, p_.D, rows, slopes_, ld_, q, query_.ld, dk.row(j), dk.ld * step);
    if (wanted.query)
      product<false>(store_rows, rows, p_.D, cols, slopes_, ld_, key_.row(lo), key_.ld, dq.row(i), dq.ld * step);
  }

 private:
  template <bool TransA>
  static void product(bool store, int64_t rows, int64_t width, int64_t depth, const T* A, int64_t lda, const T* B,
                      int64_t ldb, T* C, int64_t ldc) {
    if (store) gemm<V, TransA, false>(rows, width, depth, A, lda, B, ldb, C, ldc);
    else gemm<V, TransA, true>(rows, width, depth, A, lda, B, ldb, C, ldc);
  }

  Rows<T> stage(const View& v, int64_t first, int64_t count, int64_t b, int64_t h, int64_t width,
                T* buffer) const {
    return stage_rows<V>(at(v, head_offset(v, b, h) + first * v.stride[2]), v.dtype, v.stride[2] * region_.step, count,
                         width, buffer);
  }

  const MaskedAttentionParams& p_;
  int64_t width_;  // of staged rows of values
  T *key_panels_, *value_panels_, *key_buffer_, *value_buffer_, *query_buffer_;
  GradOut grad_out_{};
  Region region_{};
  Rows<T> key_, value_, query_;
  const T *weights_ = nullptr, *slopes_ = nullptr;
  int64_t ld_ = 0;
  bool stored_ = false;
};

}  // namespace
}  // namespace lam
