// The backward pass of masked_attention on the CPU: scores are computed again, tile by tile, and every gradient that is
// wanted is summed where it belongs, or where its products keep their sums.
#pragma once
#include <iterator>

#include "far_rows.h"
#include "masked_attention.h"
#include "row_sums.h"

namespace lam {
namespace {

// A second softmax of the same scores is worked out beside the first (global_local_attention.h); here there is none.
template <class Products>
struct NoSecondMapBackward {
  using T = typename Products::T;
  static constexpr bool kWholeTiles = false;
  using Params = MaskedAttentionParams;
  using ForwardPass = Forward<Products>;
  struct Halves {
    MaskedAttentionParams* each[1];
    explicit Halves(Params& p) : each{&p} {}
  };
  NoSecondMapBackward(const MaskedAttentionParams&, const Blocking&, bool, Products&, Arena&) {}
  void enter(const Region&) {}
  void enter_head(int64_t, int64_t) {}
  void keep_scores(int64_t, int64_t, const Tile<T>&) {}
  void add_gradient(const Tile<T>&) {}
  void accumulate(bool, Rows<T>) {}
};

template <class Products, template <class> class SecondMap = NoSecondMapBackward>
class Backward {
 public:
  using V = typename Products::Word;
  using T = typename V::T;

  static int run(const MaskedAttentionParams& given) {
    using Second = SecondMap<Products>;
    using Params = typename Second::Params;
    Params p = static_cast<const Params&>(given), again = p;
    typename Second::Halves halves(p), halves_again(again);
    const FarRows<T, std::size(halves.each)> far(halves.each);
    if (!far.any()) return run_as_given(p);
    ScratchBlock kept(far.bytes());
    if (kept.data == nullptr) return 1;
    far.redirect(halves_again.each, kept.data);
    if (const int failed = Second::ForwardPass::run(again)) return failed;
    for (size_t n = 0; n < std::size(halves.each); ++n) {
      halves.each[n]->lse = halves_again.each[n]->lse;
      halves.each[n]->lse_rest = halves_again.each[n]->lse_rest;
    }
    return run_as_given(p);
  }

 private:
  static int run_as_given(const MaskedAttentionParams& p) {
    Shared shared(p);
    const BackwardPlan& plan = shared.plan;
    const int64_t heads_per_pair = p.H / p.Hkv;
    ScratchBlock sums(shared.sums_bytes());
    if (shared.sums_bytes() > 0 && sums.data == nullptr) return 1;
    shared.place_sums(static_cast<char*>(sums.data));
    Arena sizes;
    { Backward count(p, shared, sizes); }
    ScratchBlock block(sizes.used * p.num_threads);
    if (block.data == nullptr) return 1;
    const int64_t pairs = p.B * p.Hkv;
    const auto each_pair = [&](auto&& body) {
      run_tasks(p, pairs, [&](int64_t, int64_t pair) { body(Pairs{pair, pair + 1, plan.head_major}); });
    };

    shared.clear_masks();
    if (plan.groups > 1) {
      each_pair([&](Pairs u) { shared.clear_heads(u, heads_per_pair); });
      const int64_t turn_tasks = plan.units * plan.groups;
      Turns turns(turn_tasks * plan.groups);
      if (!turns.ok()) return 1;
      run_tasks(p, turn_tasks * plan.groups, [&](int64_t worker, int64_t task) {
        Arena arena{static_cast<char*>(block.data) + worker * sizes.used};
        Backward backward(p, shared, arena);
        const int64_t turn = task / turn_tasks, unit = task % turn_tasks / plan.groups, group = task % plan.groups;
        if (turn > 0) {  // its rows were this group's before, its columns the next one's
          const int64_t before = task - turn_tasks;
          turns.wait_for(before);
          turns.wait_for(before - group + (group + 1) % plan.groups);
        }
        const Pairs u{unit * plan.pairs_per_unit, (unit + 1) * plan.pairs_per_unit, plan.head_major};
        backward.work(u, {group, plan.groups}, {(group + turn) % plan.groups, plan.groups}, group, turn, plan.groups);
        turns.finish(task);
      });
      each_pair([&](Pairs u) { shared.finish_heads(u, heads_per_pair); });
    } else {
      const int64_t tasks = plan.units * plan.replicas;
      run_tasks(p, tasks, [&](int64_t worker, int64_t task) {
        Arena arena{static_cast<char*>(block.data) + worker * sizes.used};
        Backward backward(p, shared, arena);
        const Part part{task, tasks};
        const Pairs u{part.begin(pairs), part.end(pairs), plan.head_major};
        if (!shared.one_region) shared.clear_heads(u, heads_per_pair);
        backward.work(u, {}, {}, task % plan.replicas, 0, 1);
        if (!shared.one_region) shared.finish_heads(u, heads_per_pair);
      });
    }
    shared.finish_masks();
    return 0;
  }

  // What all tasks of a call share: sizes, where each gradient is summed.
  struct Shared {
    const MaskedAttentionParams& p;
    BackwardPlan plan;
    Blocking size;
    bool one_region;
    bool want_scores;  // some gradient needs dS
    bool stored;       // one region, all of it visible: the first tile of a gradient's rows stores rather than adds
    WalkOrder order;   // of use where the products keep sums of a region
    GradTarget<T> multiplier, bias;
    // Sums of the heads' gradients over several regions, where the caller's tensors cannot take them.
    T *query_sum = nullptr, *key_sum = nullptr, *value_sum = nullptr;

    explicit Shared(const MaskedAttentionParams& params) : p(params) {
      const bool patterned = p.n_patterns > 0;
      plan = plan_backward(p, patterned);
      size = choose_blocking<Products>(p, true, ceil_div(p.Lq, plan.groups), ceil_div(p.Lk, plan.groups));
      bool stepped = false;
      for (int64_t h = 0; h < p.n_patterns; ++h) stepped = stepped || key_step(p.patterns[h]) > 1;
      one_region = plan.groups == 1 && !stepped && size.region_rows >= p.Lq && size.region_cols >= p.Lk;
      stored = one_region && !Visibility::needed(p);
      if (Products::kOwnSums && plan.groups == 1) order = {p, size.region_rows, size.region_cols, Products::kColMultiple};
      if (Products::kOwnSums && plan.groups > 1) order.queries = order.keys = !patterned;  // each turn meets all of its rows
      multiplier = target(p.grad_multiplier, p.multiplier_factors, p.grad_multiplier_factors, stepped);
      bias = target(p.grad_bias, p.bias_factors, p.grad_bias_factors, stepped);
      want_scores = p.grad_query.data || p.grad_key.data || multiplier.wanted() || bias.wanted();
    }

    GradTarget<T> target(const View& g, const Factors& factors, const Factors& grads, bool stepped) const {
      GradTarget<T> t;
      t.covered = !Visibility::needed(p);
      if (any_wanted(grads)) {
        const int64_t rank = factors.rank;
        const auto copies = [&](const View& v) { return v.stride[0] != 0 && plan.whole_samples ? 1 : plan.replicas; };
        t.factors = {&factors, Slices(p.H, factors, grads),
                     {p, grads.rows, p.Lq, rank, copies(grads.rows)},
                     {p, grads.columns, p.Lk, rank, copies(grads.columns)},
                     {p, grads.offset, 1, p.Lk, copies(grads.offset)}};
      }
      t.grad = g;
      if (g.data == nullptr) return t;
      const bool over_rows = g.stride[2] == 0 && p.Lq > 1, over_cols = g.stride[3] == 0 && p.Lk > 1;
      const bool over_batch = g.stride[0] == 0 && p.B > 1, over_heads = g.stride[1] == 0 && p.H > 1;
      t.numel = count_elements(p, g);
      t.replicas = over_rows && over_cols && plan.groups > 1 ? plan.groups : plan.replicas;
      const bool one_run = over_batch == over_heads || p.H == 1 || p.B == 1 ||
                           (over_batch ? plan.head_major && p.H == p.Hkv : !plan.head_major || p.Hkv == 1);
      t.store_once = one_run && !stepped && !over_rows && !over_cols && t.replicas == 1;
      const bool own_type = size_of(g.dtype) == sizeof(T);
      t.in_rows = !over_rows && !over_cols && (own_type || !t.store_once);
      if (own_type && t.replicas == 1) t.sum = static_cast<T*>(g.data);
      return t;
    }

    // The gradient is written through sums of the kernel's own type.
    static bool needs_sums(const GradTarget<T>& t) {
      return t.grad.data != nullptr && t.sum == nullptr && !(t.store_once && !t.in_rows);
    }
    int64_t mask_sums(const GradTarget<T>& t) const {
      return needs_sums(t) ? round_up(t.numel * t.replicas * static_cast<int64_t>(sizeof(T)), 64) : 0;
    }
    // Elements of a head's sums, where they cannot be made in the caller's tensor.
    int64_t staged_rows(const View& g, bool once, int64_t rows, int64_t w) const {
      return g.data == nullptr || once || in_place<V>(p.query.dtype) ? 0 : rows * round_up(w, V::W);
    }
    // Slots of sums: a pair's own when its task has one region, else one for every head.
    int64_t head_sums(const View& g, bool once, int64_t heads, int64_t rows, int64_t w) const {
      return one_region ? 0 : heads * staged_rows(g, once, rows, w) * static_cast<int64_t>(sizeof(T));
    }
    int64_t query_bytes() const { return head_sums(p.grad_query, order.queries_once, p.B * p.H, p.Lq, p.D); }
    int64_t key_bytes() const { return head_sums(p.grad_key, order.keys_once, p.B * p.Hkv, p.Lk, p.D); }
    int64_t value_bytes() const { return head_sums(p.grad_value, order.keys_once, p.B * p.Hkv, p.Lk, p.Dv); }
    int64_t sums_bytes() const {
      return mask_sums(multiplier) + mask_sums(bias) + multiplier.factors.bytes() + bias.factors.bytes() +
             query_bytes() + key_bytes() + value_bytes();
    }
    void place_sums(char* at) {
      GradTarget<T>* const targets[] = {&multiplier, &bias};
      for (GradTarget<T>* t : targets) {
        const int64_t factor_bytes = t->factors.bytes();
        t->factors.place(at);
        at += factor_bytes;
        if (!needs_sums(*t)) continue;
        const int64_t bytes = mask_sums(*t);
        t->sum = reinterpret_cast<T*>(at);
        at += bytes;
      }
      if (query_bytes() > 0) query_sum = reinterpret_cast<T*>(at), at += query_bytes();
      if (key_bytes() > 0) key_sum = reinterpret_cast<T*>(at), at += key_bytes();
      if (value_bytes() > 0) value_sum = reinterpret_cast<T*>(at);
    }

    void clear(char* data, int64_t bytes) const {
      constexpr int64_t kChunk = int64_t{1} << 20;
      run_tasks(p, ceil_div(bytes, kChunk), [&](int64_t, int64_t t) {
        memset(data + t * kChunk, 0, static_cast<size_t>(min64(kChunk, bytes - t * kChunk)));
      });
    }
    void clear_masks() const {
      const GradTarget<T>* const targets[] = {&multiplier, &bias};
      for (const GradTarget<T>* t : targets) {
        t->factors.clear();
        if (t->grad.data == nullptr || (t->store_once && t->covered)) continue;
        if (t->sum != nullptr) clear(reinterpret_cast<char*>(t->sum), t->numel * t->replicas * static_cast<int64_t>(sizeof(T)));
        else clear(static_cast<char*>(t->grad.data), t->numel * size_of(t->grad.dtype));
      }
    }
    void finish_masks() const {
      const GradTarget<T>* const targets[] = {&multiplier, &bias};
      for (const GradTarget<T>* t : targets) {
        t->factors.finish();
        if (t->grad.data == nullptr || t->sum == nullptr || t->sum == t->grad.data) continue;
        constexpr int64_t kChunk = 4096;
        run_tasks(p, ceil_div(t->numel, kChunk), [&](int64_t, int64_t task) {
          const int64_t begin = task * kChunk, n = min64(kChunk, t->numel - begin);
          T* sum = t->sum + begin;
          for (int64_t r = 1; r < t->replicas; ++r)
            for (int64_t k = 0; k < n; ++k) sum[k] += sum[r * t->numel + k];
          store_row<T>(static_cast<char*>(t->grad.data) + begin * size_of(t->grad.dtype), t->grad.dtype, 1, sum, T(1), n);
        });
      }
    }

    // Sum rows of one head: the caller's tensor, or sums at slot `slot`; none where one region's sums are all.
    Rows<T> rows_of(const View& g, bool once, T* sum, int64_t slot, int64_t b, int64_t h, int64_t rows, int64_t w) const {
      if (g.data == nullptr || once) return {};
      if (in_place<V>(p.query.dtype)) return {static_cast<T*>(g.data) + head_offset(g, b, h), g.stride[2]};
      return {sum + slot * rows * round_up(w, V::W), round_up(w, V::W)};
    }
    Rows<T> query_rows(T* sum, int64_t slot, int64_t b, int64_t h) const {
      return rows_of(p.grad_query, order.queries_once, sum, slot, b, h, p.Lq, p.D);
    }
    Rows<T> key_rows(T* sum, int64_t slot, int64_t b, int64_t hk) const {
      return rows_of(p.grad_key, order.keys_once, sum, slot, b, hk, p.Lk, p.D);
    }
    Rows<T> value_rows(T* sum, int64_t slot, int64_t b, int64_t hk) const {
      return rows_of(p.grad_value, order.keys_once, sum, slot, b, hk, p.Lk, p.Dv);
    }
    static void clear_rows(Rows<T> x, int64_t rows, int64_t w) {  // an only row has a stride of 0
      if (x.data != nullptr && rows > 0) memset(x.data, 0, static_cast<size_t>((rows - 1) * x.ld + w) * sizeof(T));
    }
    void finish_rows(const View& g, Rows<T> x, int64_t b, int64_t h, int64_t rows, int64_t w) const {
      if (x.data == nullptr || x.data == reinterpret_cast<T*>(at_mutable(g, head_offset(g, b, h)))) return;
      for (int64_t r = 0; r < rows; ++r)
        store_words<V>(at_mutable(g, head_offset(g, b, h) + r * g.stride[2]), g.dtype, x.data + r * x.ld, w);
    }
    static void zero_grad_rows(const View& g, int64_t b, int64_t h, int64_t first, int64_t count, int64_t step, int64_t w) {
      const size_t bytes = static_cast<size_t>(w * size_of(g.dtype));
      for (int64_t r = 0; g.data != nullptr && r < count; ++r)
        memset(at_mutable(g, head_offset(g, b, h) + (first + r * step) * g.stride[2]), 0, bytes);
    }
    template <class Body>
    void each_head(Pairs u, int64_t heads, const Body& body) const {
      for (int64_t pair = u.begin; pair < u.end; ++pair)
        for (int64_t n = 0; n < heads; ++n) body(pair, u.b(p, pair), u.key_head(p, pair), n);
    }
    void clear_heads(Pairs u, int64_t heads) const {
      each_head(u, heads, [&](int64_t pair, int64_t b, int64_t hk, int64_t n) {
        if (!order.queries) clear_rows(query_rows(query_sum, pair * heads + n, b, hk * heads + n), p.Lq, p.D);
        if (n > 0 || order.keys) return;
        clear_rows(key_rows(key_sum, pair, b, hk), p.Lk, p.D);
        clear_rows(value_rows(value_sum, pair, b, hk), p.Lk, p.Dv);
      });
    }
    void finish_heads(Pairs u, int64_t heads) const {
      each_head(u, heads, [&](int64_t pair, int64_t b, int64_t hk, int64_t n) {
        const int64_t h = hk * heads + n;
        if (!order.queries) finish_rows(p.grad_query, query_rows(query_sum, pair * heads + n, b, h), b, h, p.Lq, p.D);
        if (n > 0 || order.keys) return;
        finish_rows(p.grad_key, key_rows(key_sum, pair, b, hk), b, hk, p.Lk, p.D);
        finish_rows(p.grad_value, value_rows(value_sum, pair, b, hk), b, hk, p.Lk, p.Dv);
      });
    }
  };

  Backward(const MaskedAttentionParams& p, const Shared& shared, Arena& arena)
      : p_(p),
        s_(shared),
        masks_(p, shared.size, arena),
        products_(p, shared.size, true, arena),
        sums_(p, shared.size.region_rows, arena),
        second_(p, shared.size, shared.want_scores, products_, arena),
        grad_multiplier_(shared.multiplier, p, shared.size.region_rows, shared.size.region_cols, arena),
        grad_bias_(shared.bias, p, shared.size.region_rows, shared.size.region_cols, arena) {
    const int64_t strip = min64(s_.size.tile_rows, kStripRows) * (s_.size.tile_cols + V::W);
    scores_ = arena.take<T>(strip);
    grad_ = arena.take<T>(strip);
    if (s_.one_region) {
      query_sum_ = arena.take<T>(s_.staged_rows(p.grad_query, s_.order.queries_once, p.Lq, p.D));
      key_sum_ = arena.take<T>(s_.staged_rows(p.grad_key, s_.order.keys_once, p.Lk, p.D));
      value_sum_ = arena.take<T>(s_.staged_rows(p.grad_value, s_.order.keys_once, p.Lk, p.Dv));
    }
  }

  void work(Pairs unit, Part rows, Part cols, int64_t replica, int64_t turn, int64_t turns) {
    const bool opens = turn == 0, closes = turn + 1 == turns;
    walk_regions(p_, s_.size.region_rows, s_.size.region_cols, Products::kColMultiple, rows, cols,
                 [&](const Region& region, const Pass& pass, const Place& place) {
                   if (region.cols == 0 && !s_.one_region && !s_.order.queries) return;
                   queries_ = {opens && place.first ? 0 : region.rows, closes && place.last ? region.rows : 0};
                   keys_ = {opens ? place.keys.met : region.cols, closes ? place.keys.complete : 0};
                   if (!s_.order.queries) queries_ = {s_.stored ? 0 : region.rows, 0};
                   if (!s_.order.keys) keys_ = {s_.stored ? 0 : region.cols, 0};
                   visit(region, pass, unit, replica);
                 });
  }

  void visit(const Region& region, const Pass& pass, Pairs unit, int64_t replica) {
    masks_.enter(region);
    second_.enter(region);
    grad_multiplier_.enter(region, replica);
    grad_bias_.enter(region, replica);
    const int64_t heads = p_.H / p_.Hkv;
    for (int64_t pair = unit.begin; pair < unit.end; ++pair) {
      const int64_t b = unit.b(p_, pair), hk = unit.key_head(p_, pair);
      Rows<T> dk, dv;
      if (s_.one_region) {
        dk = s_.key_rows(key_sum_, 0, b, hk);
        dv = s_.value_rows(value_sum_, 0, b, hk);
        if (!s_.stored) s_.clear_rows(dk, p_.Lk, p_.D);
        if (!s_.stored) s_.clear_rows(dv, p_.Lk, p_.Dv);
      } else {
        dk = s_.key_rows(s_.key_sum, pair, b, hk);
        dv = s_.value_rows(s_.value_sum, pair, b, hk);
      }
      entered_ = false;
      for (int64_t n = 0; n < heads; ++n) {
        const int64_t h = hk * heads + n;
        if (p_.n_patterns > 1 && !(pass_of(p_, h) == pass)) continue;
        Rows<T> dq;
        if (s_.one_region) {
          dq = s_.query_rows(query_sum_, 0, b, h);
          if (!s_.stored) s_.clear_rows(dq, p_.Lq, p_.D);
        } else {
          dq = s_.query_rows(s_.query_sum, pair * heads + n, b, h);
        }
        const bool met = region.cols > 0 && differentiate(region, b, h, hk, dq, dk, dv);
        // in order, rows that pass a region by have no other
        if (s_.order.queries && !met) s_.zero_grad_rows(p_.grad_query, b, h, region.i0, region.rows, region.step, p_.D);
        if (s_.one_region) s_.finish_rows(p_.grad_query, dq, b, h, p_.Lq, p_.D);
      }
      if (entered_) {
        products_.close_pair(b, hk, dk, dv, keys_);
      } else if (s_.order.keys) {  // nor have keys
        s_.zero_grad_rows(p_.grad_key, b, hk, region.j0, region.cols, region.step, p_.D);
        s_.zero_grad_rows(p_.grad_value, b, hk, region.j0, region.cols, region.step, p_.Dv);
      }
      if (s_.one_region) {
        s_.finish_rows(p_.grad_key, dk, b, hk, p_.Lk, p_.D);
        s_.finish_rows(p_.grad_value, dv, b, hk, p_.Lk, p_.Dv);
      }
    }
    grad_multiplier_.leave();
    grad_bias_.leave();
  }

  // False where the head sees none of the region.
  bool differentiate(const Region& region, int64_t b, int64_t h, int64_t hk, Rows<T> dq, Rows<T> dk, Rows<T> dv) {
    const Wanted wanted{p_.grad_query.data != nullptr, p_.grad_key.data != nullptr, p_.grad_value.data != nullptr};
    const KeyRange range = p_.n_patterns > 1
                               ? tile_range(spec_of_head(p_, h), region.i(0), region.i(region.rows - 1), p_.Lq, p_.Lk)
                               : KeyRange{0, p_.Lk, 1};
    if (range.stop <= region.j0 || range.start > region.j(region.cols - 1)) return false;
    if (!entered_) {
      products_.enter_keys(region, b, hk, s_.want_scores);
      products_.open_pair(s_.stored);
    }
    const bool first_head = !entered_;
    entered_ = true;
    products_.enter_queries(region, b, h);
    products_.enter_grad_out(b, h);
    products_.open_head();
    Plane<const T> multiplier, bias;
    masks_.select(b, h, multiplier, bias);
    Tile<T> head{};
    const Plane<T> dmul = grad_multiplier_.select(b, h, head.first_multiplier);
    const Plane<T> dbias = grad_bias_.select(b, h, head.first_bias);
    sums_.enter(region, b, h);
    second_.enter_head(b, h);
    const int64_t ld = s_.size.tile_cols + V::W, tile_rows = tile_rows_of_head<Products>(p_, s_.size, h);
    for (int64_t c = 0; c < region.cols; c += s_.size.tile_cols) {
      for (int64_t r0 = 0; r0 < region.rows; r0 += tile_rows) {
        Tile<T> tile = head;
        tile.rows = min64(tile_rows, region.rows - r0);
        int64_t lo = c, hi = min64(c + s_.size.tile_cols, region.cols);
        if (!masks_.clip(r0, tile.rows, lo, hi, tile)) continue;
        tile.cols = hi - lo;
        tile.scores = scores_;
        tile.grad = grad_;
        tile.ld = ld;
        tile.scale = static_cast<T>(p_.scale);
        if (multiplier) tile.multiplier = {multiplier.row(r0) + lo, multiplier.ld};
        if (bias) tile.bias = {bias.row(r0) + lo, bias.ld};
        if (dmul) tile.grad_multiplier = {dmul.row(r0) + lo, dmul.ld};
        if (dbias) tile.grad_bias = {dbias.row(r0) + lo, dbias.ld};
        for (int64_t s = 0; s < tile.rows; s += kStripRows) {
          int64_t from;
          const Tile<T> strip = masks_.strip(tile, r0, lo, s, min64(kStripRows, tile.rows - s), from);
          const int64_t r = r0 + s, words = ceil_div(strip.cols, V::W);
          products_.scores(r, strip.rows, lo + from, words, scores_, ld);
          second_.keep_scores(r, lo, strip);
          if (s_.want_scores) products_.weight_grads(r, strip.rows, lo + from, words, grad_, ld);
          else for (int64_t k = 0; k < strip.rows; ++k) memset(grad_ + k * ld, 0, static_cast<size_t>(words * V::W) * sizeof(T));
          if (p_.dropout_p > 0) {
            masks_.draw(b, h, r, strip.rows, lo + from, strip.cols);
            masks_.drop(grad_, ld, strip.rows, strip.cols);
          }
          softmax_backward_tile<V>(strip, p_.gate, sums_.of(r));
          second_.add_gradient(strip);
          if (p_.dropout_p > 0) masks_.drop(scores_, ld, strip.rows, strip.cols);
          products_.take_slopes({s, strip.rows, from, strip.cols}, tile.rows, tile.cols, scores_, grad_, ld, wanted);
        }
        products_.accumulate(r0, tile.rows, lo, tile.cols, wanted, dq, dk, dv, lo == 0,
                             first_head && r0 == 0);
        second_.accumulate(wanted.value, dv);
      }
    }
    products_.close_head(b, h, dq, queries_);
    return true;
  }

  static constexpr int64_t kStripRows = strip_rows<Products, SecondMap<Products>>();

  const MaskedAttentionParams& p_;
  const Shared& s_;
  RegionMasks<V> masks_;
  Products products_;
  RowSums<V> sums_;
  SecondMap<Products> second_;
  MaskGradWriter<V> grad_multiplier_, grad_bias_;
  bool entered_ = false;
  Share queries_{}, keys_{};  // the region's, in the gradients
  T *scores_, *grad_;
  T *query_sum_ = nullptr, *key_sum_ = nullptr, *value_sum_ = nullptr;
};

}  // namespace
}  // namespace lam
