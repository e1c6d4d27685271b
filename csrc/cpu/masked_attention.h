// masked_attention on the CPU, forward and backward: a template over the number type and SIMD width, compiled once for
// every instruction set. Formulas: python_ref/masked_attention.py.
//
// The scores are walked in regions, rectangles of pairs whose mask tile stays in the second-level cache while every
// head that shares it goes by; a region is walked in tiles, whose scores stay there as well, or, in strips, in the
// first-level cache. All packing happens when a head enters a region. No two tasks add to the same number (schedule.h),
// so results repeat bit for bit.
#pragma once
#include <cmath>
#include <cstdint>

#include "../philox.h"
#include "arena.h"
#include "masks.h"
#include "products_fma.h"
#include "rows.h"
#include "schedule.h"
#include "softmax.h"
#include "tasks.h"
#include "visibility.h"

namespace lam {
namespace {

// Is a head that sees this pattern better worked on in short tiles? They visit fewer hidden pairs, but reuse each key for
// fewer rows.
template <class Products>
bool suits_short_tiles(const MaskedAttentionParams& p, const PatternSpec& spec) {
  const auto keys_seen = [&](int64_t rows) {  // by a tile in the middle
    const int64_t step = key_step(spec), first = max64(0, p.Lq / step - rows) / 2 * step;
    const int64_t last = first + min64(rows - 1, (p.Lq - 1 - first) / step) * step;
    const KeyRange range = tile_range(spec, first, last, p.Lq, p.Lk);
    return (range.stop - range.start) / step;
  };
  return 9 * keys_seen(Products::blocking(true, false).tile_rows) < 8 * keys_seen(Products::blocking(false, false).tile_rows);
}

// The block of a block-diagonal pattern of all heads, 0 where there is none.
inline int64_t common_block(const MaskedAttentionParams& p) {
  if (p.n_patterns != 1) return 0;
  const PatternSpec& spec = p.patterns[0];
  for (int t = 0; t < spec.n_terms; ++t)
    if (spec.terms[t].kind == PatternKind::block_diagonal) return spec.terms[t].a;
  return 0;
}

// The region and tile sizes of a call: whole tiles, evenly divided.
template <class Products>
Blocking choose_blocking(const MaskedAttentionParams& p, bool backward, int64_t rows, int64_t cols) {
  bool narrow = p.n_patterns > 0 && p.Lq > 0;
  for (int64_t h = 0; narrow && h < p.n_patterns; ++h) narrow = suits_short_tiles<Products>(p, p.patterns[h]);
  Blocking s = Products::blocking(narrow, backward);
  constexpr int64_t R = Products::kRowMultiple, C = Products::kColMultiple;
  s.region_rows = round_up(ceil_div(max64(rows, 1), ceil_div(max64(rows, 1), s.region_rows)), R);
  s.region_cols = min64(s.region_cols, round_up(max64(cols, 1), C));
  s.tile_rows = round_up(ceil_div(s.region_rows, ceil_div(s.region_rows, s.tile_rows)), R);
  s.tile_cols = round_up(ceil_div(s.region_cols, ceil_div(s.region_cols, s.tile_cols)), C);
  s.short_rows = min64(s.tile_rows, Products::blocking(true, backward).tile_rows);
  // a tile that is a block sees all of its keys and no others
  const int64_t block = common_block(p);
  if (block >= 16 && block <= 96 && block < s.region_rows && (Products::kAnyRows || block % R == 0)) {
    s.tile_rows = s.short_rows = block;
    s.region_rows = s.region_rows / block * block;
  }
  return s;
}

// The rows of a tile of head h.
template <class Products>
int64_t tile_rows_of_head(const MaskedAttentionParams& p, const Blocking& s, int64_t h) {
  const bool few = p.n_patterns > 1 && suits_short_tiles<Products>(p, p.patterns[h]);
  return few ? s.short_rows : s.tile_rows;
}

// The keep bits of a tile of head (b, h), one row of 64-bit words a query.
template <class T>
void draw_dropout(const MaskedAttentionParams& p, const Region& region, int64_t b, int64_t h, int64_t r0, int64_t rows,
                  int64_t c0, int64_t cols, uint64_t* keep, int64_t keep_ld) {
  const uint32_t threshold = dropout_threshold(p.dropout_p);
  const uint64_t seed = static_cast<uint64_t>(p.dropout_seed);
  for (int64_t r = 0; r < rows; ++r) {
    int64_t drawn = -1;
    Philox4 words{};
    for (int64_t c = 0; c < cols; c += 64) {
      uint64_t bits = 0;
      for (int64_t k = 0; k < min64(64, cols - c); ++k) {
        const int64_t j = region.j(c0 + c + k);
        if (j / 4 != drawn) {
          drawn = j / 4;
          words = philox4x32_10(static_cast<uint32_t>(drawn), static_cast<uint32_t>(region.i(r0 + r)),
                                static_cast<uint32_t>(b * p.H + h), static_cast<uint32_t>(p.dropout_offset),
                                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        }
        bits |= uint64_t{words.word[j % 4] >= threshold} << k;
      }
      keep[r * keep_ld + c / 64] = bits;
    }
  }
}

// What both directions keep of a region: visibility, masks, dropout.
template <class V>
struct RegionMasks {
  using T = typename V::T;
  const MaskedAttentionParams& p;
  bool has_visibility;
  int64_t tile_cols;
  Visibility visibility;
  MaskReader<V> multiplier, bias;
  uint64_t* keep;
  Region region{};

  RegionMasks(const MaskedAttentionParams& params, const Blocking& s, Arena& arena)
      : p(params),
        has_visibility(Visibility::needed(params)),
        tile_cols(s.tile_cols),
        visibility(params, has_visibility ? s.region_rows : 0, has_visibility ? s.region_cols : 0, arena),
        multiplier(params.multiplier, params.multiplier_factors, params.H, s.region_rows, s.region_cols, arena),
        bias(params.bias, params.bias_factors, params.H, s.region_rows, s.region_cols, arena),
        keep(arena.take<uint64_t>(params.dropout_p > 0 ? s.tile_rows * Visibility::words_per_row(s.tile_cols) : 0)) {}

  void enter(const Region& r) {
    region = r;
    if (has_visibility) visibility.enter(r);
    multiplier.enter(r);
    bias.enter(r);
  }

  void select(int64_t b, int64_t h, Plane<const T>& mul, Plane<const T>& add) {
    if (has_visibility) visibility.select(b, h);
    mul = multiplier.select(b, h);
    add = bias.select(b, h);
  }

  // Clips columns [lo, hi) of rows [r0, r0 + rows) to those seen, and says which bits the tile needs.
  bool clip(int64_t r0, int64_t rows, int64_t& lo, int64_t& hi, Tile<T>& tile) const {
    tile.visible = nullptr;
    if (has_visibility) {
      if (!visibility.template narrow<V>(r0, rows, lo, hi)) tile.visible = visibility.row(r0);
      tile.visible_ld = visibility.ld();
      tile.visible_bit = lo;
    }
    return lo < hi;
  }

  // Rows [s, s + rows) of a tile from row r0 and column lo on, narrowed to the columns from `from` on that they see.
  Tile<T> strip(const Tile<T>& tile, int64_t r0, int64_t lo, int64_t s, int64_t rows, int64_t& from) const {
    int64_t first = lo, last = lo + tile.cols;
    if (tile.visible != nullptr && rows < tile.rows) visibility.template narrow<V>(r0 + s, rows, first, last);
    constexpr int64_t kPackedColumns = 32;  // that products take at once
    from = max64(0, min64(first, last) - lo) / kPackedColumns * kPackedColumns;
    return strip_of(tile, s, rows, from, max64(0, last - lo - from));
  }

  void drop(T* x, int64_t ld, int64_t rows, int64_t cols) const {
    drop_rows<V>(x, ld, rows, cols, keep, Visibility::words_per_row(tile_cols), static_cast<T>(1 / (1 - p.dropout_p)));
  }
  void draw(int64_t b, int64_t h, int64_t r0, int64_t rows, int64_t c0, int64_t cols) const {
    draw_dropout<T>(p, region, b, h, r0, rows, c0, cols, keep, Visibility::words_per_row(tile_cols));
  }
};

// The rows of a head's result: where they go if they can be summed there, else in `buffer` from row `first`.
template <class V>
Rows<typename V::T> out_rows(const View& out, DType dtype, int64_t Dv, const Region& region, int64_t b, int64_t h,
                             typename V::T* buffer, int64_t first) {
  const int64_t width = round_up(Dv, V::W);
  if (!in_place<V>(dtype)) return {buffer + first * width, width};
  const int64_t* st = out.stride;
  return {static_cast<typename V::T*>(out.data) + head_offset(out, b, h) + region.i0 * st[2], st[2] * region.step};
}

// Sums of e^(score - max) v and their states -> result and lse. A row that saw no key: 0 and -inf.
template <class V>
void finish_rows(const MaskedAttentionParams& p, const Region& region, int64_t b, int64_t h, Rows<typename V::T> out,
                 const RowState<typename V::T>* state, const uint8_t* opened, int64_t rows_per_flag) {
  using T = typename V::T;
  for (int64_t r = 0; r < region.rows; ++r) {
    T* row = out.data + r * out.ld;
    const bool seen = opened[r / rows_per_flag] && state[r].sum != T(0);
    const int64_t i = region.i(r);
    const int64_t at_lse = head_offset(p.lse, b, h) + i * p.lse.stride[2];
    const T max = seen ? state[r].max : -kInfinity<T>, rest = seen ? std::log(state[r].sum) : T(0);
    const bool apart = p.lse_rest.data != nullptr;
    reinterpret_cast<T*>(p.lse.data)[at_lse] = apart ? max : max + rest;
    if (apart) reinterpret_cast<T*>(p.lse_rest.data)[at_lse] = rest;
    if (!seen) memset(row, 0, static_cast<size_t>(p.Dv) * sizeof(T));
    const T factor = seen ? T(1) / state[r].sum : T(0);
    if (in_place<V>(p.query.dtype)) {
      if (seen) scale_row<V>(row, p.Dv, factor);
    } else {
      store_row<T>(at_mutable(p.out, head_offset(p.out, b, h) + i * p.out.stride[2]), p.query.dtype, 1, row, factor, p.Dv);
    }
  }
}

// A second softmax of the same scores is worked out beside the first (global_local_attention.h); here there is none.
template <class Products>
struct NoSecondMap {
  using T = typename Products::T;
  static constexpr bool kWholeTiles = false;
  NoSecondMap(const MaskedAttentionParams&, const Blocking&, int64_t, Arena&) {}
  void enter(const Region&) {}
  void enter_head(int64_t, int64_t, int64_t, bool) {}
  void attend(int64_t, int64_t, const Tile<T>&, Products&) {}
  void finish() {}
};

// Rows of a tile that are worked on at once.
template <class Products, class SecondMap>
constexpr int64_t strip_rows() {
  return SecondMap::kWholeTiles ? kWholeTile : Products::kStripRows;
}

template <class Products, template <class> class SecondMap = NoSecondMap>
class Forward {
 public:
  using V = typename Products::Word;
  using T = typename V::T;

  static int run(const MaskedAttentionParams& p) {
    const int64_t unit_heads = heads_together(p) ? p.H : p.H / p.Hkv;
    const int64_t units = p.B * p.H / unit_heads;
    Blocking s = choose_blocking<Products>(p, false, p.Lq, p.Lk);
    // enough tasks to even the work out: within one, a region may keep what the last one found
    int64_t parts = min64(ceil_div(p.Lq, s.region_rows), ceil_div(16 * p.num_threads, units));
    if (units * parts < 2 * p.num_threads)
      parts = max64(parts, min64(ceil_div(2 * p.num_threads, units), ceil_div(p.Lq, s.tile_rows)));
    while (units * parts < 8 * p.num_threads && units * parts % p.num_threads != 0 && parts < p.Lq) ++parts;
    const int64_t align = s.tile_rows == common_block(p) ? s.tile_rows : 1;  // parts hold whole blocks
    s = choose_blocking<Products>(p, false, ceil_div(p.Lq, parts) + align - 1, p.Lk);
    const bool one_region = s.region_cols >= p.Lk;
    Arena sizes;
    { Forward count(p, s, unit_heads, one_region, sizes); }
    ScratchBlock block(sizes.used * p.num_threads);
    if (block.data == nullptr) return 1;
    run_tasks(p, units * parts, [&](int64_t worker, int64_t task) {
      Arena arena{static_cast<char*>(block.data) + worker * sizes.used};
      Forward forward(p, s, unit_heads, one_region, arena);
      forward.first_head_ = task / parts * unit_heads;
      walk_regions(p, s.region_rows, s.region_cols, Products::kColMultiple, {task % parts, parts, align}, {},
                   [&](const Region& region, const Pass& pass, const Place& place) {
                     forward.visit(region, pass, place.first, place.last);
                   });
    });
    return 0;
  }

 private:
  // Heads that read one mask are worked on together, for its tile to be read once.
  static bool heads_together(const MaskedAttentionParams& p) {
    const View* const masks[] = {&p.multiplier, &p.bias};
    for (const View* v : masks)
      if (v->data != nullptr && v->stride[1] == 0 && v->stride[2] != 0 && v->stride[3] != 0) return true;
    const Factors* const factors[] = {&p.multiplier_factors, &p.bias_factors};
    for (const Factors* f : factors)
      if (f->rank > 0 && Slices(p.H, *f).per_head == 0) return true;
    return suits_whole_samples(p);
  }

  Forward(const MaskedAttentionParams& p, const Blocking& s, int64_t unit_heads, bool one_region, Arena& arena)
      : p_(p),
        s_(s),
        unit_heads_(unit_heads),
        one_region_(one_region),
        masks_(p, s, arena),
        products_(p, s, false, arena),
        second_(p, s, one_region ? 1 : unit_heads, arena) {
    const int64_t states = one_region ? 1 : unit_heads;
    scores_ = arena.take<T>(min64(s.tile_rows, kStripRows) * (s.tile_cols + V::W));
    out_ = arena.take<T>(in_place<V>(p.query.dtype) ? 0 : states * s.region_rows * round_up(p.Dv, V::W));
    state_ = arena.take<RowState<T>>(states * s.region_rows);
    opened_ = arena.take<uint8_t>(states * ceil_div(s.region_rows, s.short_rows));
  }

  void visit(const Region& region, const Pass& pass, bool first, bool last) {
    masks_.enter(region);
    second_.enter(region);
    entered_keys_ = -1;
    const int64_t tiles = ceil_div(s_.region_rows, s_.short_rows);
    for (int64_t n = 0; n < unit_heads_; ++n) {
      const int64_t b = (first_head_ + n) / p_.H, h = (first_head_ + n) % p_.H;
      if (p_.n_patterns > 1 && !(pass_of(p_, h) == pass)) continue;
      const int64_t state = one_region_ ? 0 : n;
      uint8_t* opened = opened_ + state * tiles;
      const int64_t tile_rows = tile_rows_of_head<Products>(p_, s_, h);
      if (first) memset(opened, 0, static_cast<size_t>(tiles));
      Rows<T> out = out_rows<V>(p_.out, p_.query.dtype, p_.Dv, region, b, h, out_, state * s_.region_rows);
      second_.enter_head(b, h, state, first);
      if (region.cols > 0) attend(region, b, h, tile_rows, out, state_ + state * s_.region_rows, opened);
      if (!last) continue;
      finish_rows<V>(p_, region, b, h, out, state_ + state * s_.region_rows, opened, tile_rows);
      second_.finish();
    }
  }

  void attend(const Region& region, int64_t b, int64_t h, int64_t tile_rows, Rows<T> out, RowState<T>* state,
              uint8_t* opened) {
    const int64_t hk = h / (p_.H / p_.Hkv);
    const KeyRange range = p_.n_patterns > 1
                               ? tile_range(spec_of_head(p_, h), region.i(0), region.i(region.rows - 1), p_.Lq, p_.Lk)
                               : KeyRange{0, p_.Lk, 1};
    if (range.stop <= region.j0 || range.start > region.j(region.cols - 1)) return;
    Plane<const T> multiplier, bias;
    masks_.select(b, h, multiplier, bias);
    if (b * p_.Hkv + hk != entered_keys_) {
      entered_keys_ = b * p_.Hkv + hk;
      products_.enter_keys(region, b, hk, false);
    }
    products_.enter_queries(region, b, h);
    const int64_t ld = s_.tile_cols + V::W;
    for (int64_t r0 = 0, block = 0; r0 < region.rows; r0 += tile_rows, ++block) {
      const int64_t rows = min64(tile_rows, region.rows - r0);
      for (int64_t c = 0; c < region.cols; c += s_.tile_cols) {
        int64_t lo = c, hi = min64(c + s_.tile_cols, region.cols);
        Tile<T> tile{};
        if (!masks_.clip(r0, rows, lo, hi, tile)) continue;
        tile.rows = rows;
        tile.cols = hi - lo;
        tile.scores = scores_;
        tile.ld = ld;
        tile.scale = static_cast<T>(p_.scale);
        if (multiplier) tile.multiplier = {multiplier.row(r0) + lo, multiplier.ld};
        if (bias) tile.bias = {bias.row(r0) + lo, bias.ld};
        for (int64_t s = 0; s < rows; s += kStripRows) {
          int64_t from;
          const Tile<T> strip = masks_.strip(tile, r0, lo, s, min64(kStripRows, rows - s), from);
          const int64_t r = r0 + s;
          products_.scores(r, strip.rows, lo + from, ceil_div(strip.cols, V::W), scores_, ld);
          second_.attend(r, lo, strip, products_);
          softmax_tile<V>(strip, p_.gate, state + r, !opened[block], out.row(r), out.ld, p_.Dv);
          if (p_.dropout_p > 0) {
            masks_.draw(b, h, r, strip.rows, lo + from, strip.cols);
            masks_.drop(scores_, ld, strip.rows, strip.cols);
          }
          products_.take_weights({s, strip.rows, from, strip.cols}, tile.cols, scores_, ld);
        }
        products_.weigh_values(!opened[block], rows, lo, tile.cols, out.row(r0), out.ld);
        opened[block] = 1;
      }
    }
  }

  static constexpr int64_t kStripRows = strip_rows<Products, SecondMap<Products>>();

  const MaskedAttentionParams& p_;
  const Blocking& s_;
  int64_t unit_heads_;
  bool one_region_;
  RegionMasks<V> masks_;
  Products products_;
  SecondMap<Products> second_;
  int64_t first_head_ = 0, entered_keys_ = -1;
  T *scores_, *out_;
  RowState<T>* state_;
  uint8_t* opened_;
};

}  // namespace
}  // namespace lam
