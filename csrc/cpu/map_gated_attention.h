// map_gated_attention (GateAtt) on the CPU. Formulas: python_ref/map_gated_attention.py.
//
// A block of query rows is worked on whole: its rows of both maps, of the gate's logit and of their gradients lie in the
// second-level cache, never more. The local map is cut into pieces narrowed to the keys they see, so that its products
// with a gate cost what the neighbourhood costs. A gate's gradient is summed in one copy a task, with tasks fixed by the
// number of threads, and the copies in their order: it repeats bit for bit.
#pragma once
#include "global_local_attention.h"

namespace lam {
namespace {

// `Gates` multiplies by the gates: FmaGates (gates_fma.h) or AmxGates (gates_amx.h).
template <class Products, class Gates>
class MapGate {
 public:
  using V = typename Products::Word;
  using T = typename V::T;

  static int forward(const MapGatedAttentionParams& p) {
    const Sizes sizes(p);
    const int64_t heads = p.B * p.H, blocks = ceil_div(p.Lq, sizes.blocking.tile_rows);
    const int64_t parts = heads >= 2 * p.num_threads ? 1 : min64(blocks, ceil_div(2 * p.num_threads, heads));
    return run(p, sizes, false, heads * parts, [&](MapGate& gate, int64_t task, T*) {
      gate.attend(task / parts, blocks * (task % parts) / parts, blocks * (task % parts + 1) / parts);
    });
  }

  static int backward(const MapGatedAttentionParams& p) {
    const Sizes sizes(p);
    const int64_t heads = p.B * p.H, parts = min64(p.num_threads, heads);
    return run(p, sizes, true, parts, [&](MapGate& gate, int64_t part, T* sums) {
      const Part mine{part, parts};
      gate.differentiate(mine.begin(heads), mine.end(heads), sums);
    });
  }

 private:
  struct Sizes {
    Blocking blocking;
    int64_t ld, width, depth;
    bool want_maps, want_gates;  // some gradient needs those of the maps; some gate's is wanted

    explicit Sizes(const MapGatedAttentionParams& p) {
      constexpr int64_t R = Products::kRowMultiple, C = Products::kColMultiple;
      ld = round_up(p.Lk, C) + V::W;
      // Blocks of even size: all planes of the backward pass share the second-level cache, while a gate comes from
      // beyond it once a block.
      constexpr int64_t kPlanes = 6, kPlaneBytes = 840 << 10;
      const int64_t most = max64(R, kPlaneBytes / (kPlanes * ld * static_cast<int64_t>(sizeof(T))));
      const int64_t rows = max64(p.Lq, 1);
      blocking = {round_up(rows, R), round_up(p.Lk, C), round_up(ceil_div(rows, ceil_div(rows, most)), R), round_up(p.Lk, C)};
      width = round_up(p.Dv, V::W);
      depth = round_up(p.D, V::W);
      want_maps = p.grad_query.data || p.grad_key.data;
      want_gates = p.grad_gate_global.data || p.grad_gate_local.data;
    }
  };

  // What all tasks of a call share.
  struct Shared {
    typename Gates::Staged gates;
    T* sums;
    int64_t used;
  };

  // Stages the gates, runs the tasks, sums and stores the gradients of the gates.
  template <class Body>
  static int run(const MapGatedAttentionParams& p, const Sizes& sizes, bool backward, int64_t tasks,
                 const Body& body) {
    const int64_t sum = Gates::sum_elements(p.Lk), copies = backward && sizes.want_gates ? 2 * tasks : 0;
    const auto cut = [&](Arena arena) {
      const typename Gates::Staged gates(p, backward && sizes.want_maps, arena);
      return Shared{gates, arena.take<T>(copies * sum), arena.used};
    };
    ScratchBlock shared(cut({}).used);
    if (shared.data == nullptr) return 1;
    const Shared staged = cut({static_cast<char*>(shared.data)});
    const typename Gates::Staged& gates = staged.gates;
    T* const sums = copies > 0 ? staged.sums : nullptr;
    Arena count;
    { MapGate counted(p, sizes, gates, backward, count); }
    ScratchBlock block(count.used * p.num_threads);
    if (block.data == nullptr) return 1;
    run_tasks(p, tasks, [&](int64_t worker, int64_t task) {
      Arena arena{static_cast<char*>(block.data) + worker * count.used};
      MapGate mine(p, sizes, gates, backward, arena);
      T* own = sums == nullptr ? nullptr : sums + task * 2 * sum;
      if (own != nullptr) memset(own, 0, static_cast<size_t>(2 * sum) * sizeof(T));
      body(mine, task, own);
    });
    if (sums != nullptr) finish_gates(p, sums, tasks);
    return 0;
  }

  static void finish_gates(const MapGatedAttentionParams& p, T* sums, int64_t tasks) {
    const int64_t sum = Gates::sum_elements(p.Lk);
    run_tasks(p, 2 * ceil_div(p.Lk, Gates::kRowsStored), [&](int64_t, int64_t task) {
      const bool whole = task % 2 == 0;
      const View& grad = whole ? p.grad_gate_global : p.grad_gate_local;
      T* const first = whole ? sums : sums + sum;
      if (grad.data != nullptr) Gates::store_sums(grad, whole ? T(1) : T(-1), p.Lk, task / 2, first, tasks, 2 * sum);
    });
  }

  MapGate(const MapGatedAttentionParams& p, const Sizes& sizes, const typename Gates::Staged& gates, bool backward, Arena& arena)
      : p_(p),
        without_pattern_(whole(p)),
        s_(sizes),
        products_(p, sizes.blocking, backward, arena),
        gates_(p, gates, sizes.blocking.tile_rows, backward, arena),
        whole_visible_(without_pattern_, sizes.blocking.region_rows, sizes.blocking.region_cols, arena),
        pieces_(p, sizes.blocking, arena),
        ld_(sizes.ld) {
    // products write whole blocks of their row multiple
    const int64_t rows = round_up(sizes.blocking.tile_rows, Products::kRowMultiple), plane = rows * ld_;
    whole_ = arena.take<T>(plane);
    gate_ = arena.take<T>(plane);
    mixed_ = arena.take<T>(plane);
    state_ = arena.take<RowState<T>>(rows);
    sums_ = arena.take<T>(rows);
    kept_ = arena.take<Piece>(rows);
    if (!backward) {
      out_ = arena.take<T>(in_place<V>(p.query.dtype) ? 0 : rows * s_.width);
      return;
    }
    grad_ = arena.take<T>(plane);
    grad_logit_ = arena.take<T>(plane);
    near_grad_ = arena.take<T>(plane);
    const bool staged = !Products::kOwnSums && !in_place<V>(p.query.dtype);
    query_sum_ = arena.take<T>(staged && p.grad_query.data ? p.Lq * s_.depth : 0);
    key_sum_ = arena.take<T>(staged && p.grad_key.data ? p.Lk * s_.depth : 0);
    value_sum_ = arena.take<T>(staged && p.grad_value.data ? p.Lk * s_.width : 0);
  }
  MapGate(const MapGate&) = delete;
  MapGate& operator=(const MapGate&) = delete;

  static MaskedAttentionParams whole(MaskedAttentionParams p) {
    p.n_patterns = 0;
    return p;
  }

  void enter_head(int64_t head, bool backward) {
    b_ = head / p_.H, h_ = head % p_.H;
    region_ = {0, p_.Lq, 0, p_.Lk, 1};
    if (p_.key_mask.data != nullptr) {
      whole_visible_.enter(region_);
      whole_visible_.select(b_, h_);
    }
    pieces_.enter(region_);
    pieces_.enter_head(b_, h_);
    products_.enter_keys(region_, b_, h_, backward);
    products_.enter_queries(region_, b_, h_);
  }

  // Both maps, the gate R and the mixed map of rows [r0, r0 + rows).
  void mix(int64_t r0, int64_t rows) {
    const int64_t words = ceil_div(p_.Lk, V::W);
    products_.scores(r0, rows, 0, words, whole_, ld_);
    Tile<T> tile{};
    tile.rows = rows;
    tile.cols = p_.Lk;
    tile.scores = whole_;
    tile.ld = ld_;
    tile.scale = static_cast<T>(p_.scale);
    n_kept_ = 0;
    for (int64_t s = 0; s < rows; s += LocalPieces<Products>::kRows) {
      Piece& piece = kept_[n_kept_];
      piece.s = s;
      if (!pieces_.cut(r0, 0, tile, s, piece.tile, piece.lo)) continue;
      probabilities(piece.tile);
      ++n_kept_;
    }
    if (p_.key_mask.data != nullptr) {
      tile.visible = whole_visible_.row(r0);
      tile.visible_ld = whole_visible_.ld();
    }
    probabilities(tile);
    gates_.whole_logit(r0, rows, whole_, gate_, ld_);
    for (int64_t n = 0; n < n_kept_; ++n) {
      const Piece& k = kept_[n];
      gates_.add_near_logit(r0 + k.s, k.tile.rows, k.lo, k.tile.cols, k.tile.scores, k.tile.ld, gate_ + k.s * ld_, ld_);
    }
    const typename V::reg one = V::set1(T(1)), minus_log2e = V::set1(-kLog2e<T>);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < words * V::W; c += V::W) {
        T* u = gate_ + r * ld_ + c;
        const typename V::reg gate = V::div(one, V::add(one, V::exp2(V::mul(V::load(u), minus_log2e))));
        V::store(u, gate);
        V::store(mixed_ + r * ld_ + c, V::mul(gate, V::load(whole_ + r * ld_ + c)));
      }
    each_near([&](const Piece& k, int64_t r, int64_t c, T* near) {
      const int64_t to = (k.s + r) * ld_ + k.lo + c;
      const typename V::reg rest = V::sub(one, V::load(gate_ + to));
      V::store(mixed_ + to, V::fma(rest, V::load(near), V::load(mixed_ + to)));
    });
    if (!p_.renormalise) return;
    for (int64_t r = 0; r < rows; ++r) {
      T* row = mixed_ + r * ld_;
      const T sum = row_sum(row, words);
      sums_[r] = sum;
      scale_row<V>(row, p_.Lk, sum != T(0) ? T(1) / sum : T(0));
    }
  }

  // scores -> softmax
  void probabilities(const Tile<T>& tile) {
    softmax_tile<V>(tile, false, state_, true, nullptr, 0, 0);
    for (int64_t r = 0; r < tile.rows; ++r)
      scale_row<V>(tile.scores + r * tile.ld, tile.cols, state_[r].sum != T(0) ? T(1) / state_[r].sum : T(0));
  }

  static T row_sum(const T* row, int64_t words) {
    typename V::reg sum = V::zero();
    for (int64_t c = 0; c < words * V::W; c += V::W) sum = V::add(sum, V::load(row + c));
    return V::reduce_add(sum);
  }
  static T row_dot(const T* x, const T* y, int64_t words) {
    typename V::reg sum = V::zero();
    for (int64_t c = 0; c < words * V::W; c += V::W) sum = V::fma(V::load(x + c), V::load(y + c), sum);
    return V::reduce_add(sum);
  }

  // Calls body(piece, row, column, local map) for every word of the local map.
  template <class Body>
  void each_near(const Body& body) {
    for (int64_t n = 0; n < n_kept_; ++n)
      for (int64_t r = 0; r < kept_[n].tile.rows; ++r)
        for (int64_t c = 0; c < kept_[n].tile.cols; c += V::W)
          body(kept_[n], r, c, kept_[n].tile.scores + r * kept_[n].tile.ld + c);
  }

  void attend(int64_t head, int64_t first_block, int64_t last_block) {
    enter_head(head, false);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t r0 = block * s_.blocking.tile_rows, rows = min64(s_.blocking.tile_rows, p_.Lq - r0);
      mix(r0, rows);
      const Region part{r0, rows, 0, p_.Lk, 1};
      const Rows<T> out = out_rows<V>(p_.out, p_.query.dtype, p_.Dv, part, b_, h_, out_, 0);
      products_.take_weights({0, rows, 0, p_.Lk}, p_.Lk, mixed_, ld_);
      products_.weigh_values(true, rows, 0, p_.Lk, out.data, out.ld);
      if (in_place<V>(p_.query.dtype)) continue;
      for (int64_t r = 0; r < rows; ++r)
        store_words<V>(at_mutable(p_.out, head_offset(p_.out, b_, h_) + (r0 + r) * p_.out.stride[2]), p_.out.dtype,
                       out.data + r * out.ld, p_.Dv);
    }
  }

  // Where the rows of a head's gradient are summed, if the products do not: all stored by the first block that meets them.
  Rows<T> grad_rows(const View& g, T* sum, int64_t width) const {
    if (g.data == nullptr) return {};
    if (!in_place<V>(p_.query.dtype)) return {sum, round_up(width, V::W)};
    return {static_cast<T*>(g.data) + head_offset(g, b_, h_), g.stride[2]};
  }
  void store_rows(const View& g, Rows<T> x, int64_t rows, int64_t width) const {
    if (g.data == nullptr || in_place<V>(p_.query.dtype)) return;
    for (int64_t r = 0; r < rows; ++r)
      store_words<V>(at_mutable(g, head_offset(g, b_, h_) + r * g.stride[2]), g.dtype, x.data + r * x.ld, width);
  }

  void differentiate(int64_t first_head, int64_t last_head, T* gate_sums) {
    T* const whole_sum = p_.grad_gate_global.data != nullptr ? gate_sums : nullptr;
    T* const near_sum = p_.grad_gate_local.data != nullptr ? gate_sums + Gates::sum_elements(p_.Lk) : nullptr;
    const Wanted wanted{p_.grad_query.data != nullptr, p_.grad_key.data != nullptr, p_.grad_value.data != nullptr};
    for (int64_t head = first_head; head < last_head; ++head) {
      enter_head(head, true);
      products_.enter_grad_out(b_, h_);
      products_.open_pair(true);
      products_.open_head();
      gates_.open_head();
      const Rows<T> dq = grad_rows(p_.grad_query, query_sum_, p_.D), dk = grad_rows(p_.grad_key, key_sum_, p_.D),
                    dv = grad_rows(p_.grad_value, value_sum_, p_.Dv);
      for (int64_t r0 = 0; r0 < p_.Lq; r0 += s_.blocking.tile_rows) {
        const int64_t rows = min64(s_.blocking.tile_rows, p_.Lq - r0);
        mix(r0, rows);
        if (s_.want_maps || s_.want_gates) slope(r0, rows, whole_sum, near_sum);
        products_.take_slopes({0, rows, 0, p_.Lk}, rows, p_.Lk, mixed_, grad_, ld_, wanted);
        products_.accumulate(r0, rows, 0, p_.Lk, wanted, dq, dk, dv, true, r0 == 0);
      }
      gates_.close_head(whole_sum, near_sum);
      products_.close_pair(b_, h_, dk, dv, {0, p_.Lk});
      products_.close_head(b_, h_, dq, {0, p_.Lq});
      if constexpr (!Products::kOwnSums) {
        store_rows(p_.grad_query, dq, p_.Lq, p_.D);
        store_rows(p_.grad_key, dk, p_.Lk, p_.D);
        store_rows(p_.grad_value, dv, p_.Lk, p_.Dv);
      }
    }
  }

  // grad_ = dS * scale of the rows that mix() has prepared, and the gates' gradients.
  void slope(int64_t r0, int64_t rows, T* whole_sum, T* near_sum) {
    const int64_t words = ceil_div(p_.Lk, V::W);
    const typename V::reg one = V::set1(T(1));
    products_.weight_grads(r0, rows, 0, words, grad_, ld_);
    for (int64_t r = 0; r < rows; ++r) {
      T *grad = grad_ + r * ld_, *logit = grad_logit_ + r * ld_;
      const T *gate = gate_ + r * ld_, *whole = whole_ + r * ld_;
      const bool divide = p_.renormalise;
      const typename V::reg along = V::set1(divide ? row_dot(grad, mixed_ + r * ld_, words) : T(0));
      const typename V::reg factor = V::set1(!divide ? T(1) : sums_[r] != T(0) ? T(1) / sums_[r] : T(0));
      for (int64_t c = 0; c < words * V::W; c += V::W) {
        const typename V::reg g = V::load(gate + c), x = V::mul(V::sub(V::load(grad + c), along), factor);
        V::store(grad + c, x);
        V::store(logit + c, V::mul(V::mul(x, V::mul(g, V::sub(one, g))), V::load(whole + c)));
      }
    }
    each_near([&](const Piece& k, int64_t r, int64_t c, T* near) {
      const int64_t to = (k.s + r) * ld_ + k.lo + c;
      const typename V::reg g = V::load(gate_ + to), x = V::load(grad_ + to), rest = V::sub(one, g);
      const typename V::reg steep = V::mul(x, V::mul(g, rest));
      // the difference first: it is 0 where both maps agree
      V::store(grad_logit_ + to, V::mul(steep, V::sub(V::load(whole_ + to), V::load(near))));
      V::store(near_grad_ + (k.s + r) * ld_ + c, V::mul(x, rest));
    });
    gates_.take_logit_grads(r0, rows, grad_logit_, ld_);
    if (whole_sum != nullptr) gates_.sum_whole(rows, whole_, ld_, whole_sum);
    for (int64_t n = 0; near_sum != nullptr && n < n_kept_; ++n) {
      const Piece& k = kept_[n];
      gates_.sum_near(k.s, k.tile.rows, k.lo, k.tile.cols, k.tile.scores, k.tile.ld, near_sum);
    }
    if (!s_.want_maps) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < words * V::W; c += V::W) {
        T* grad = grad_ + r * ld_ + c;
        V::store(grad, V::mul(V::load(grad), V::load(gate_ + r * ld_ + c)));
      }
    gates_.add_whole_grad(rows, grad_, ld_);
    for (int64_t r = 0; r < rows; ++r) softmax_slope(whole_ + r * ld_, grad_ + r * ld_, words);
    for (int64_t n = 0; n < n_kept_; ++n) {
      const Piece& k = kept_[n];
      const int64_t near_words = ceil_div(k.tile.cols, V::W);
      T* near_grad = near_grad_ + k.s * ld_;
      gates_.add_near_grad(k.s, k.tile.rows, k.lo, k.tile.cols, near_grad, ld_);
      for (int64_t r = 0; r < k.tile.rows; ++r) {
        softmax_slope(k.tile.scores + r * k.tile.ld, near_grad + r * ld_, near_words);
        T* to = grad_ + (k.s + r) * ld_ + k.lo;
        for (int64_t c = 0; c < near_words * V::W; c += V::W)
          V::store(to + c, V::add(V::load(to + c), V::load(near_grad + r * ld_ + c)));
      }
    }
  }

  // grad -> scale * map * (grad - rowsum(map * grad))
  void softmax_slope(const T* map, T* grad, int64_t words) const {
    const typename V::reg mean = V::set1(row_dot(map, grad, words)), scale = V::set1(static_cast<T>(p_.scale));
    for (int64_t c = 0; c < words * V::W; c += V::W)
      V::store(grad + c, V::mul(V::mul(scale, V::load(map + c)), V::sub(V::load(grad + c), mean)));
  }

  struct Piece {
    Tile<T> tile;
    int64_t s, lo;  // first row in the block, first key
  };

  const MapGatedAttentionParams& p_;
  MaskedAttentionParams without_pattern_;
  const Sizes& s_;
  Products products_;
  Gates gates_;
  Visibility whole_visible_;
  LocalPieces<Products> pieces_;
  int64_t ld_, b_ = 0, h_ = 0, n_kept_ = 0;  // rows of a plane: ld_ elements apart
  Region region_{};
  T *whole_, *gate_, *mixed_, *sums_, *out_ = nullptr, *grad_ = nullptr, *grad_logit_ = nullptr, *near_grad_ = nullptr;
  T *query_sum_ = nullptr, *key_sum_ = nullptr, *value_sum_ = nullptr;
  RowState<T>* state_;
  Piece* kept_;
};

}  // namespace
}  // namespace lam
