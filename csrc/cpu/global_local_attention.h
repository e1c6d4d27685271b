// global_local_attention on the CPU: masked_attention's walk over all pairs, with a second softmax of the same scores
// on the tiles that the local pattern touches. Formulas: python_ref/global_local_attention.py.
//
// The local half works in pieces of few rows, each narrowed to the columns that its rows see: a tile that suits the
// global half is several times wider than a neighbourhood.
#pragma once
#include "masked_attention_backward.h"

namespace lam {
namespace {

// A tile's rows cut into pieces, and what the local pattern leaves of each.
template <class Products>
class LocalPieces {
 public:
  using V = typename Products::Word;
  using T = typename V::T;
  static constexpr int64_t kRows = Products::kAnyRows ? 4 * V::kRows : Products::kRowMultiple;

  LocalPieces(const MaskedAttentionParams& p, const Blocking& s, Arena& arena)
      : p_(p),
        visibility_(p, s.region_rows, s.region_cols, arena),
        ld_(s.tile_cols + V::W),
        scores_(arena.take<T>(s.tile_rows * ld_)) {}

  void enter(const Region& region) {
    region_ = region;
    visibility_.enter(region);
  }
  void enter_head(int64_t b, int64_t h) { visibility_.select(b, h); }

  // The piece of tile rows [s, s + rows), which is columns [lo, lo + tile.cols) of the region from row r0 on, with the
  // scores copied; false when it sees nothing.
  bool cut(int64_t r0, int64_t lo, const Tile<T>& tile, int64_t s, Tile<T>& piece, int64_t& piece_lo) const {
    const int64_t rows = min64(kRows, tile.rows - s);
    int64_t first = lo, last = lo + tile.cols;
    const bool all = visibility_.template narrow<V>(r0 + s, rows, first, last);
    if (first >= last) return false;
    piece = tile;
    piece.rows = rows;
    piece.cols = last - first;
    piece.visible = all ? nullptr : visibility_.row(r0 + s);
    piece.visible_ld = visibility_.ld();
    piece.visible_bit = first;
    piece.scores = scores_ + s * ld_;
    piece.ld = ld_;
    const int64_t from = first - lo;
    shift(piece.multiplier, s, from);
    shift(piece.bias, s, from);
    shift(piece.grad_multiplier, s, from);
    shift(piece.grad_bias, s, from);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < piece.cols; c += V::W)
        V::store(piece.scores + r * ld_ + c, V::load(tile.scores + (s + r) * tile.ld + from + c));
    piece_lo = first;
    return true;
  }

  int64_t ld() const { return ld_; }
  const Region& region() const { return region_; }
  const MaskedAttentionParams& params() const { return p_; }

 private:
  template <class Element>
  static void shift(Plane<Element>& plane, int64_t r, int64_t c) {
    if (plane) plane.data = plane.row(r) + c;
  }

  const MaskedAttentionParams& p_;
  Visibility visibility_;
  Region region_{};
  int64_t ld_;
  T* scores_;
};

inline const MaskedAttentionParams& local_of(const MaskedAttentionParams& p) {
  return static_cast<const GlobalLocalAttentionParams&>(p).local;
}

template <class Products>
class LocalMap {
 public:
  static constexpr bool kWholeTiles = true;  // products keep the weights of one map at a time
  using V = typename Products::Word;
  using T = typename V::T;

  LocalMap(const MaskedAttentionParams& p, const Blocking& s, int64_t states, Arena& arena)
      : p_(local_of(p)), s_(s), pieces_(p_, s, arena) {
    buffer_ = arena.take<T>(in_place<V>(p.query.dtype) ? 0 : states * s.region_rows * round_up(p.Dv, V::W));
    states_ = arena.take<RowState<T>>(states * s.region_rows);
    opened_ = arena.take<uint8_t>(states * s.region_rows);
  }

  void enter(const Region& region) { pieces_.enter(region); }

  void enter_head(int64_t b, int64_t h, int64_t slot, bool first) {
    b_ = b, h_ = h;
    state_ = states_ + slot * s_.region_rows;
    seen_ = opened_ + slot * s_.region_rows;
    const Region& region = pieces_.region();
    out_ = out_rows<V>(p_.out, p_.query.dtype, p_.Dv, region, b, h, buffer_, slot * s_.region_rows);
    if (first) memset(seen_, 0, static_cast<size_t>(region.rows));
    if (region.cols > 0) pieces_.enter_head(b, h);
  }

  void attend(int64_t r0, int64_t lo, const Tile<T>& tile, Products& products) {
    for (int64_t s = 0; s < tile.rows; s += kPieceRows) {
      Tile<T> piece;
      int64_t from;
      if (!pieces_.cut(r0, lo, tile, s, piece, from)) continue;
      const int64_t r = r0 + s;
      const bool first = !seen_[r];
      T* to = out_.data + r * out_.ld;
      softmax_tile<V>(piece, false, state_ + r, first, to, out_.ld, p_.Dv);
      products.take_weights({0, piece.rows, 0, piece.cols}, piece.cols, piece.scores, piece.ld);
      products.weigh_values(first, piece.rows, from, piece.cols, to, out_.ld);
      memset(seen_ + r, 1, static_cast<size_t>(piece.rows));
    }
  }

  void finish() { finish_rows<V>(p_, pieces_.region(), b_, h_, out_, state_, seen_, 1); }

 private:
  static constexpr int64_t kPieceRows = LocalPieces<Products>::kRows;

  const MaskedAttentionParams& p_;
  const Blocking& s_;
  LocalPieces<Products> pieces_;
  int64_t b_ = 0, h_ = 0;
  T* buffer_;
  RowState<T>*states_, *state_ = nullptr;
  uint8_t *opened_, *seen_ = nullptr;  // one a row
  Rows<T> out_{};
};

template <class Products>
class LocalMapBackward {
 public:
  static constexpr bool kWholeTiles = true;  // and pieces keep their weights until the tile's own are through
  using V = typename Products::Word;
  using T = typename V::T;
  using Params = GlobalLocalAttentionParams;
  using ForwardPass = Forward<Products, LocalMap>;
  struct Halves {
    MaskedAttentionParams* each[2];
    explicit Halves(Params& p) : each{&p, &p.local} {}
  };

  LocalMapBackward(const MaskedAttentionParams& p, const Blocking& s, bool want_scores, Products& products, Arena& arena)
      : p_(local_of(p)),
        products_(products),
        want_scores_(want_scores),
        pieces_(p_, s, arena),
        sums_(p_, s.region_rows, arena),
        grad_out_(products.take_grad_out(s, arena)),
        grad_(arena.take<T>(kPieceRows * pieces_.ld())),
        kept_(arena.take<Piece>(ceil_div(s.tile_rows, kPieceRows))) {}

  void enter(const Region& region) { pieces_.enter(region); }

  void enter_head(int64_t b, int64_t h) {
    pieces_.enter_head(b, h);
    sums_.enter(pieces_.region(), b, h);
    products_.enter_grad_out(grad_out_, p_.grad_out, b, h);
  }

  // Before the global half turns the tile's scores into weights.
  void keep_scores(int64_t r0, int64_t lo, const Tile<T>& tile) {
    n_kept_ = 0;
    for (int64_t s = 0; s < tile.rows; s += kPieceRows) {
      Piece& piece = kept_[n_kept_];
      if (!pieces_.cut(r0, lo, tile, s, piece.tile, piece.lo)) continue;
      piece.r = r0 + s;
      piece.s = s;
      piece.lo_in_tile = piece.lo - lo;
      ++n_kept_;
    }
  }

  // After the global half: the masks' gradients hold its part, and so does the tile's gradient of the scores.
  void add_gradient(const Tile<T>& tile) {
    if (n_kept_ == 0) return;
    products_.swap_grad_out(grad_out_);
    for (int64_t n = 0; n < n_kept_; ++n) {
      Piece& piece = kept_[n];
      Tile<T>& t = piece.tile;
      t.grad = grad_;
      t.first_multiplier = t.first_bias = false;
      const int64_t words = ceil_div(t.cols, V::W);
      if (want_scores_) products_.weight_grads(piece.r, t.rows, piece.lo, words, grad_, t.ld);
      else for (int64_t r = 0; r < t.rows; ++r) memset(grad_ + r * t.ld, 0, static_cast<size_t>(words * V::W) * sizeof(T));
      softmax_backward_tile<V>(t, false, sums_.of(piece.r));
      if (!want_scores_) continue;
      for (int64_t r = 0; r < t.rows; ++r) {
        T* to = tile.grad + (piece.s + r) * tile.ld + piece.lo_in_tile;
        for (int64_t c = 0; c < t.cols; c += V::W) V::store(to + c, V::add(V::load(to + c), V::load(grad_ + r * t.ld + c)));
      }
    }
    products_.swap_grad_out(grad_out_);
  }

  // dv += P^T grad_out
  void accumulate(bool wanted_value, Rows<T> dv) {
    const Wanted wanted{false, false, true};
    if (n_kept_ == 0 || !wanted_value) return;
    products_.swap_grad_out(grad_out_);
    for (int64_t n = 0; n < n_kept_; ++n) {
      const Piece& piece = kept_[n];
      const Tile<T>& t = piece.tile;
      products_.take_slopes({0, t.rows, 0, t.cols}, t.rows, t.cols, t.scores, t.scores, t.ld, wanted);
      products_.accumulate(piece.r, t.rows, piece.lo, t.cols, wanted, {}, {}, dv, false, false);
    }
    products_.swap_grad_out(grad_out_);
  }

 private:
  static constexpr int64_t kPieceRows = LocalPieces<Products>::kRows;
  struct Piece {
    Tile<T> tile;
    int64_t r, s, lo, lo_in_tile;  // first row in the region and in the tile, first column likewise
  };

  const MaskedAttentionParams& p_;
  Products& products_;
  bool want_scores_;
  LocalPieces<Products> pieces_;
  RowSums<V> sums_;
  typename Products::GradOut grad_out_;
  T* grad_;
  Piece* kept_;
  int64_t n_kept_ = 0;
};

}  // namespace
}  // namespace lam
