// The work between the matrix products: fuse with the masks, hide, softmax, and its gradient, row by row of a tile.
// Scores stay in natural units until their row's maximum or lse is subtracted, which is exact where it matters: only
// then are they scaled to the exponent of 2. Formulas: python_ref/masked_attention.py.
#pragma once
#include <cstdint>

namespace lam {
namespace {

enum class BiasKind { none, add, gate };

template <class T>
constexpr T kLog2e = static_cast<T>(1.442695040888963407359924681001892137L);
template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// A matrix that a tile reads or adds to; absent when data is null. ld is 0 where one row serves all.
template <class T>
struct Plane {
  T* data = nullptr;
  int64_t ld = 0;
  explicit operator bool() const { return data != nullptr; }
  T* row(int64_t r) const { return data + r * ld; }
};

// Rows of a mask lie further apart than the processor foresees: while a row is worked on, the next one is called for.
template <class T>
class NextRow {
 public:
  NextRow(const Plane<T>& plane, int64_t r, int64_t rows) : row_(plane.row(r + 1 < rows ? r + 1 : r)) {}
  void fetch(int64_t c) const { __builtin_prefetch(row_ + c); }

 private:
  const T* row_;
};

template <class T>
struct Tile {
  int64_t rows, cols;
  T* scores;  // [rows, ld]: q . k on entry, the weights on leaving
  T* grad;    // [rows, ld]: grad_out . v on entry, the gradient of q . k on leaving
  int64_t ld;
  Plane<const T> multiplier, bias;
  Plane<T> grad_multiplier, grad_bias;
  bool first_multiplier, first_bias;  // store rather than add to the mask's gradient
  const uint64_t* visible;            // bits of row r start at visible[r * visible_ld]; null when all are visible
  int64_t visible_ld, visible_bit;    // column 0 of the tile is this bit of the row
  T scale;
};

// `rows` rows and `cols` columns of a tile from row s and column c on, whose scores and gradients lie where the tile's own
// began.
template <class T>
Tile<T> strip_of(Tile<T> t, int64_t s, int64_t rows, int64_t c, int64_t cols) {
  t.rows = rows;
  t.cols = cols;
  if (t.multiplier) t.multiplier.data = t.multiplier.row(s) + c;
  if (t.bias) t.bias.data = t.bias.row(s) + c;
  if (t.grad_multiplier) t.grad_multiplier.data = t.grad_multiplier.row(s) + c;
  if (t.grad_bias) t.grad_bias.data = t.grad_bias.row(s) + c;
  if (t.visible != nullptr) t.visible += s * t.visible_ld;
  t.visible_bit += c;
  return t;
}

template <class V>
inline typename V::mask lanes_visible(const uint64_t* row, int64_t bit) {
  return V::from_bits(static_cast<uint32_t>(row[bit >> 6] >> (bit & 63)) & ((uint32_t{1} << V::W) - 1));
}
template <class V>
inline typename V::mask lanes_inside(int64_t n) {
  return V::from_bits(n >= V::W ? (uint32_t{1} << V::W) - 1 : (uint32_t{1} << n) - 1);
}

// x[0, n) *= factor
template <class V>
inline void scale_row(typename V::T* x, int64_t n, typename V::T factor) {
  const typename V::reg f = V::set1(factor);
  int64_t c = 0;
  for (; c + V::W <= n; c += V::W) V::store(x + c, V::mul(f, V::load(x + c)));
  if (c == n) return;
  const auto inside = lanes_inside<V>(n - c);
  V::store(x + c, V::mul(f, V::load(x + c, inside)), inside);
}

// Calls step(column, inside, visible, masked) for the words of a row; masked is a compile-time false where every lane
// counts, which is most of the time.
template <class V, bool AlwaysMasked, class T, class Step>
__attribute__((always_inline)) inline void for_words(const Tile<T>& t, int64_t r, Step step) {
  struct True { constexpr operator bool() const { return true; } };
  struct False { constexpr operator bool() const { return false; } };
  const auto all = V::from_bits((uint32_t{1} << V::W) - 1);
  int64_t c = 0;
  if (t.visible != nullptr) {
    const uint64_t* row = t.visible + r * t.visible_ld;
    for (; c < t.cols; c += V::W) {
      const auto inside = lanes_inside<V>(t.cols - c);
      step(c, inside, V::both(inside, lanes_visible<V>(row, t.visible_bit + c)), True{});
    }
    return;
  }
  for (; c + V::W <= t.cols; c += V::W) {
    if constexpr (AlwaysMasked) step(c, all, all, True{});
    else step(c, all, all, False{});
  }
  if (c < t.cols) {
    const auto inside = lanes_inside<V>(t.cols - c);
    step(c, inside, inside, True{});
  }
}

// Running maximum and sum of a row.
template <class T>
struct RowState {
  T max, sum;
};

// scores -> e^(score - max); `state` and the rows of `out` are brought to the new maximum.
template <class V, bool kMultiplier, BiasKind kBias>
void softmax_rows(const Tile<typename V::T>& t, RowState<typename V::T>* state, bool first, typename V::T* out,
                  int64_t out_ld, int64_t out_cols) {
  using T = typename V::T;
  using reg = typename V::reg;
  // a bias of -inf must hide a multiplier of NaN, a gate of 0 a score beyond the maximum
  constexpr bool kAlwaysMasked = kBias == BiasKind::gate || (kBias == BiasKind::add && kMultiplier);
  const reg scale = V::set1(t.scale), log2e = V::set1(kLog2e<T>), hidden = V::set1(-kInfinity<T>);
  for (int64_t r = 0; r < t.rows; ++r) {
    T* s = t.scores + r * t.ld;
    const T* mul = kMultiplier ? t.multiplier.row(r) : nullptr;
    const T* bias = kBias != BiasKind::none ? t.bias.row(r) : nullptr;
    const NextRow<const T> next_mul(t.multiplier, r, t.rows), next_bias(t.bias, r, t.rows);
    reg max0 = hidden, max1 = hidden;
    for_words<V, kAlwaysMasked>(t, r, [&](int64_t c, auto, auto visible, auto masked) {
      reg x = V::mul(V::load(s + c), scale);
      if constexpr (kMultiplier) next_mul.fetch(c);
      if constexpr (kBias != BiasKind::none) next_bias.fetch(c);
      if constexpr (kMultiplier) x = V::mul(x, masked ? V::load(mul + c, visible) : V::load(mul + c));
      if constexpr (kBias != BiasKind::none) {
        const reg b = masked ? V::load(bias + c, visible) : V::load(bias + c);
        if constexpr (kBias == BiasKind::add) x = V::add(x, b);
        if constexpr (kAlwaysMasked) visible = V::both(visible, V::not_equal(b, kBias == BiasKind::add ? -kInfinity<T> : T(0)));
      }
      if (masked) x = V::select(visible, x, hidden);
      if (c & V::W) max1 = V::max(max1, x);
      else max0 = V::max(max0, x);
      V::store(s + c, x);
    });
    const T tile_max = V::reduce_max(V::max(max0, max1));
    const T old_max = first ? -kInfinity<T> : state[r].max;
    const T new_max = tile_max > old_max ? tile_max : old_max;
    const T pivot = new_max == -kInfinity<T> ? T(0) : new_max;  // a row that has seen no key yet: not -inf - -inf
    const reg shift = V::set1(pivot);
    reg sum0 = V::zero(), sum1 = V::zero();
    const auto weigh = [&](int64_t c) {
      reg e = V::exp2(V::mul(V::sub(V::load(s + c), shift), log2e));
      if constexpr (kBias == BiasKind::gate) {
        auto visible = lanes_inside<V>(t.cols - c);
        if (t.visible != nullptr)
          visible = V::both(visible, lanes_visible<V>(t.visible + r * t.visible_ld, t.visible_bit + c));
        e = V::mul(e, V::load(bias + c, visible));
      }
      V::store(s + c, e);
      return e;
    };
    int64_t c = 0;
    for (; c + 2 * V::W <= t.cols; c += 2 * V::W) {
      sum0 = V::add(sum0, weigh(c));
      sum1 = V::add(sum1, weigh(c + V::W));
    }
    for (; c < t.cols; c += V::W) sum0 = V::add(sum0, weigh(c));
    const T sum = V::reduce_add(V::add(sum0, sum1));
    if (first) {
      state[r] = {new_max, sum};
      continue;
    }
    alignas(64) T decay[V::W];
    V::store(decay, V::exp2(V::mul(V::set1(old_max - pivot), log2e)));
    state[r] = {new_max, state[r].sum * decay[0] + sum};
    if (decay[0] != T(1)) {
      scale_row<V>(out + r * out_ld, out_cols, decay[0]);
    }
  }
}

// What the backward pass knows of rows. lse is shift + rest; shift is +inf for a row that sees no key.
template <class T>
struct RowSlopes {
  const T *shift, *rest;
  const T* delta;  // rowsum(grad_out * out) - grad_lse
};

// scores -> P, grad -> dS.
template <class V, bool kMultiplier, BiasKind kBias, bool kGradMultiplier, bool kGradBias>
void softmax_backward_rows(const Tile<typename V::T>& t, const RowSlopes<typename V::T>& rows) {
  using T = typename V::T;
  using reg = typename V::reg;
  constexpr bool kAlwaysMasked = kBias == BiasKind::gate || (kBias == BiasKind::add && kMultiplier);
  const reg scale = V::set1(t.scale), log2e = V::set1(kLog2e<T>);
  for (int64_t r = 0; r < t.rows; ++r) {
    T *s = t.scores + r * t.ld, *g = t.grad + r * t.ld;
    const T* mul = kMultiplier ? t.multiplier.row(r) : nullptr;
    const T* bias = kBias != BiasKind::none ? t.bias.row(r) : nullptr;
    T* dmul = kGradMultiplier ? t.grad_multiplier.row(r) : nullptr;
    T* dbias = kGradBias ? t.grad_bias.row(r) : nullptr;
    const NextRow<const T> next_mul(t.multiplier, r, t.rows), next_bias(t.bias, r, t.rows);
    const NextRow<T> next_dmul(t.grad_multiplier, r, t.rows), next_dbias(t.grad_bias, r, t.rows);
    const reg row_shift = V::set1(rows.shift[r]), row_delta = V::set1(rows.delta[r]);
    const reg minus_rest = V::set1(-kLog2e<T> * rows.rest[r]);
    for_words<V, kAlwaysMasked>(t, r, [&](int64_t c, auto inside, auto visible, auto masked) {
      if constexpr (kMultiplier) next_mul.fetch(c);
      if constexpr (kBias != BiasKind::none) next_bias.fetch(c);
      if constexpr (kGradMultiplier) next_dmul.fetch(c);
      if constexpr (kGradBias) next_dbias.fetch(c);
      const reg y = V::mul(V::load(s + c), scale);
      reg m, b;
      reg x = y;
      if constexpr (kMultiplier) {
        m = masked ? V::load(mul + c, visible) : V::load(mul + c);
        x = V::mul(y, m);
      }
      auto weighted = visible;  // pairs that have a weight: a gate of 0 has none, but it has a gradient
      if constexpr (kBias != BiasKind::none) {
        b = masked ? V::load(bias + c, visible) : V::load(bias + c);
        if constexpr (kBias == BiasKind::add) x = V::add(x, b);
        if constexpr (kAlwaysMasked) weighted = V::both(weighted, V::not_equal(b, kBias == BiasKind::add ? -kInfinity<T> : T(0)));
      }
      reg p = V::exp2(V::fma(V::sub(x, row_shift), log2e, minus_rest));
      if (masked) p = V::keep(kBias == BiasKind::gate ? visible : weighted, p);
      reg dz = V::mul(p, V::sub(V::load(g + c), row_delta));
      if constexpr (kGradBias) {
        reg old = V::zero();
        if (!t.first_bias) old = masked ? V::load(dbias + c, inside) : V::load(dbias + c);
        const reg sum = V::add(old, masked ? V::keep(kBias == BiasKind::gate ? visible : weighted, dz) : dz);
        if (masked) V::store(dbias + c, sum, inside);
        else V::store(dbias + c, sum);
      }
      if constexpr (kBias == BiasKind::gate) {
        p = V::keep(weighted, V::mul(b, p));
        dz = V::mul(b, dz);
      }
      if (masked) dz = V::keep(weighted, dz);
      if constexpr (kGradMultiplier) {
        reg old = V::zero();
        if (!t.first_multiplier) old = masked ? V::load(dmul + c, inside) : V::load(dmul + c);
        const reg sum = V::fma(dz, y, old);
        if (masked) V::store(dmul + c, sum, inside);
        else V::store(dmul + c, sum);
      }
      reg ds = V::mul(dz, scale);
      if constexpr (kMultiplier) ds = V::mul(ds, m);
      if (masked) ds = V::keep(weighted, ds);
      V::store(s + c, p);
      V::store(g + c, ds);
    });
  }
}

template <class V>
void softmax_tile(const Tile<typename V::T>& t, bool gate, RowState<typename V::T>* state, bool first,
                  typename V::T* out, int64_t ld, int64_t cols) {
  const BiasKind kind = !t.bias ? BiasKind::none : gate ? BiasKind::gate : BiasKind::add;
  if (t.multiplier) {
    if (kind == BiasKind::none) softmax_rows<V, true, BiasKind::none>(t, state, first, out, ld, cols);
    else if (kind == BiasKind::add) softmax_rows<V, true, BiasKind::add>(t, state, first, out, ld, cols);
    else softmax_rows<V, true, BiasKind::gate>(t, state, first, out, ld, cols);
  } else {
    if (kind == BiasKind::none) softmax_rows<V, false, BiasKind::none>(t, state, first, out, ld, cols);
    else if (kind == BiasKind::add) softmax_rows<V, false, BiasKind::add>(t, state, first, out, ld, cols);
    else softmax_rows<V, false, BiasKind::gate>(t, state, first, out, ld, cols);
  }
}

template <class V, bool kMultiplier, BiasKind kBias>
void softmax_backward_tile(const Tile<typename V::T>& t, const RowSlopes<typename V::T>& rows) {
  const bool gm = static_cast<bool>(t.grad_multiplier), gb = static_cast<bool>(t.grad_bias);
  if constexpr (kMultiplier && kBias != BiasKind::none)
    if (gm && gb) return softmax_backward_rows<V, kMultiplier, kBias, true, true>(t, rows);
  if constexpr (kMultiplier)
    if (gm) return softmax_backward_rows<V, kMultiplier, kBias, true, false>(t, rows);
  if constexpr (kBias != BiasKind::none)
    if (gb) return softmax_backward_rows<V, kMultiplier, kBias, false, true>(t, rows);
  softmax_backward_rows<V, kMultiplier, kBias, false, false>(t, rows);
}

template <class V>
void softmax_backward_tile(const Tile<typename V::T>& t, bool gate, const RowSlopes<typename V::T>& rows) {
  const BiasKind kind = !t.bias ? BiasKind::none : gate ? BiasKind::gate : BiasKind::add;
  if (t.multiplier) {
    if (kind == BiasKind::none) softmax_backward_tile<V, true, BiasKind::none>(t, rows);
    else if (kind == BiasKind::add) softmax_backward_tile<V, true, BiasKind::add>(t, rows);
    else softmax_backward_tile<V, true, BiasKind::gate>(t, rows);
  } else {
    if (kind == BiasKind::none) softmax_backward_tile<V, false, BiasKind::none>(t, rows);
    else if (kind == BiasKind::add) softmax_backward_tile<V, false, BiasKind::add>(t, rows);
    else softmax_backward_tile<V, false, BiasKind::gate>(t, rows);
  }
}

// x -> kept ? x * factor : 0, by the bits of `keep`.
template <class V>
void drop_rows(typename V::T* x, int64_t ld, int64_t rows, int64_t cols, const uint64_t* keep, int64_t keep_ld,
               typename V::T factor) {
  const typename V::reg f = V::set1(factor);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += V::W)
      V::store(x + r * ld + c, V::keep(lanes_visible<V>(keep + r * keep_ld, c), V::mul(f, V::load(x + r * ld + c))));
}

}  // namespace
}  // namespace lam
