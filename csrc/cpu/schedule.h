// Who works on what: units of heads that share a gradient, row and column groups, and the regions a task walks through.
#pragma once
#include <cstdint>

#include "../patterns.h"
#include "visibility.h"

namespace lam {
namespace {

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// A run of (batch, key head) pairs. Heads are visited pair by pair, each with the query heads of its group.
struct Pairs {
  int64_t begin, end;
  bool head_major;  // pair = key_head * B + b rather than b * Hkv + key_head
  int64_t b(const MaskedAttentionParams& p, int64_t pair) const { return head_major ? pair % p.B : pair / p.Hkv; }
  int64_t key_head(const MaskedAttentionParams& p, int64_t pair) const {
    return head_major ? pair / p.B : pair % p.Hkv;
  }
};

// Queries of one residue class meet keys of one residue class, `step` apart.
struct Pass {
  int64_t step, phase;  // a query of residue x sees keys of residue x + phase
  bool operator==(const Pass& o) const { return step == o.step && phase == o.phase; }
};

inline Pass pass_of(const MaskedAttentionParams& p, int64_t h) {
  if (p.n_patterns == 0) return {1, 0};
  const PatternSpec& spec = spec_of_head(p, h);
  const int64_t step = key_step(spec);
  for (int t = 0; step > 1 && t < spec.n_terms; ++t)
    if (spec.terms[t].kind == PatternKind::dilated_toeplitz && spec.terms[t].b == step)
      return {step, floor_mod(diagonal(spec.terms[t], p.Lq, p.Lk), step)};
  return {1, 0};
}

// Part `index` of `count` equal parts of [0, n), cut at multiples of `align`.
struct Part {
  int64_t index = 0, count = 1, align = 1;
  int64_t begin(int64_t n) const { return n * index / count / align * align; }
  int64_t end(int64_t n) const { return index + 1 == count ? n : n * (index + 1) / count / align * align; }
};

// A region's part in a gradient: the first `met` of its rows have sums of regions before, the first `complete` get no more.
struct Share {
  int64_t met, complete;
};

// Where a region comes in a walk. What it says of the keys holds where the rows' keys move one way only (WalkOrder).
struct Place {
  bool first, last;  // of its rows
  Share keys;
};

// Calls visit(region, pass, place) for every region of the unit's rows and columns that some head may see. Rows that see
// nothing get one region without columns.
template <class Visit>
void walk_regions(const MaskedAttentionParams& p, int64_t max_rows, int64_t max_cols, int64_t col_multiple, Part rows,
                  Part cols, const Visit& visit) {
  const int64_t n_specs = p.n_patterns > 1 ? p.H : 1;
  for (int64_t leader = 0; leader < n_specs; ++leader) {
    const Pass pass = pass_of(p, leader);
    bool seen = false;
    for (int64_t h = 0; h < leader && !seen; ++h) seen = pass_of(p, h) == pass;
    if (seen) continue;
    for (int64_t residue = 0; residue < min64(pass.step, p.Lq); ++residue) {
      const int64_t n_rows = ceil_div(p.Lq - residue, pass.step);
      const int64_t key_residue = (residue + pass.phase) % pass.step;
      struct Reach {
        int64_t lo, hi;
      };
      const auto reach = [&](int64_t r) {
        const int64_t count = min64(max_rows, rows.end(n_rows) - r);
        const int64_t first_i = residue + r * pass.step, last_i = first_i + (count - 1) * pass.step;
        int64_t lo = p.n_patterns == 0 ? 0 : p.Lk, hi = p.n_patterns == 0 ? p.Lk : 0;
        for (int64_t h = leader; p.n_patterns > 0 && h < n_specs; ++h) {
          if (!(pass_of(p, h) == pass)) continue;
          const KeyRange range = tile_range(p.patterns[h], first_i, last_i, p.Lq, p.Lk);
          lo = min64(lo, range.start);
          hi = max64(hi, range.stop);
        }
        lo = max64(lo, cols.begin(p.Lk));
        return Reach{lo + floor_mod(key_residue - lo, pass.step), min64(hi, cols.end(p.Lk))};
      };
      const Reach none{p.Lk, 0};
      Reach before = none, now = none, after = none;
      for (int64_t r = rows.begin(n_rows); r < rows.end(n_rows); r += max_rows) {
        const int64_t count = min64(max_rows, rows.end(n_rows) - r), first_i = residue + r * pass.step;
        before = now;
        now = r == rows.begin(n_rows) ? reach(r) : after;
        after = r + max_rows < rows.end(n_rows) ? reach(r + max_rows) : none;
        const int64_t lo = now.lo, n_cols = lo < now.hi ? ceil_div(now.hi - lo, pass.step) : 0;
        const int64_t regions = n_cols > 0 ? ceil_div(n_cols, max_cols) : 1;
        const int64_t width = min64(max_cols, ceil_div(ceil_div(n_cols, regions), col_multiple) * col_multiple);
        for (int64_t g = 0, c = 0; g < regions; ++g, c += width) {
          const Region region{first_i, count, lo + c * pass.step, max64(0, min64(width, n_cols - c)), pass.step};
          const auto columns_below = [&](int64_t j) {
            return j <= region.j0 ? 0 : min64(region.cols, ceil_div(j - region.j0, pass.step));
          };
          visit(region, pass, Place{g == 0, g == regions - 1, {columns_below(before.hi), columns_below(after.lo)}});
        }
      }
    }
  }
}

// What regions that come in order know of each other: where a gradient's rows are met in order, those that nothing was added
// to yet are stored, and complete ones are done with. Where they are met once, no sums of them outlive a region. Rows that
// come in another order, or keys that nobody sees, need sums that are cleared before and stored after.
struct WalkOrder {
  bool queries = false, keys = false;
  bool queries_once = false, keys_once = false;

  WalkOrder() = default;
  WalkOrder(const MaskedAttentionParams& p, int64_t max_rows, int64_t max_cols, int64_t col_multiple) {
    queries_once = keys_once = keys = true;
    int64_t lo = 0, hi = p.Lk;  // keys of the rows before, of the same residue class
    Pass only{0, 0};
    walk_regions(p, max_rows, max_cols, col_multiple, {}, {}, [&](const Region& region, const Pass& pass, const Place& place) {
      queries_once = queries_once && place.first && place.last;
      keys_once = keys_once && place.keys.met == 0 && place.keys.complete == region.cols;
      if (only.step == 0) only = pass;
      keys = keys && region.cols > 0 && only == pass;
      if (!keys) return;
      const int64_t end = region.j(region.cols);
      if (place.first) {
        const bool opens = region.i0 < region.step;  // the class of its rows
        keys = opens ? hi >= p.Lk && region.j0 < region.step : region.j0 >= lo && region.j0 <= hi;
        lo = region.j0;
        if (opens) hi = 0;
      }
      if (place.last) keys = keys && end >= hi, hi = end;
    });
    // every key is in a class that some query meets
    keys = keys && hi >= p.Lk && only.step > 0 && only.step <= p.Lq;
    keys_once = keys_once && keys;
    // a head may pass by regions that others see
    queries = queries_once || p.n_patterns <= 1;
    keys = keys_once || (keys && p.n_patterns <= 1);
  }
};

// Are the heads of a sample better left to one task? Where sequences are short, which pairs may be seen takes long to find
// beside the products, and is found once.
inline bool suits_whole_samples(const MaskedAttentionParams& p) {
  constexpr int64_t kShort = 128;
  const bool enough_tasks = p.B % p.num_threads == 0 || p.B >= 4 * p.num_threads;
  return p.Lq <= kShort && p.Lk <= kShort && enough_tasks;
}

// Which heads one task of the backward pass must own, so that no two tasks ever add to the same number.
struct BackwardPlan {
  bool head_major = false;
  int64_t pairs_per_unit = 1;  // pairs that share a wanted mask gradient, or else a sample
  int64_t units = 1;
  int64_t groups = 1;  // row groups and column groups of a unit: in turn f, group g owns (rows g, columns g + f)
  int64_t replicas = 1;  // parts of a unit's pairs, each with a copy of the mask gradients, instead of groups
  bool whole_samples = false;  // no two of those parts meet in a sample
};

// Elements of a gradient; 0 when it is not wanted.
inline int64_t count_elements(const MaskedAttentionParams& p, const View& g) {
  if (g.data == nullptr) return 0;
  const int64_t sizes[] = {p.B, p.H, p.Lq, p.Lk};
  int64_t n = 1;
  for (int axis = 0; axis < 4; ++axis) n *= g.stride[axis] == 0 ? 1 : sizes[axis];
  return n;
}

// The same of a factor's gradient, whose two last axes are always full.
inline int64_t count_factor_elements(const MaskedAttentionParams& p, const View& g, int64_t length, int64_t width) {
  if (g.data == nullptr) return 0;
  return (g.stride[0] == 0 ? 1 : p.B) * (g.stride[1] == 0 ? 1 : p.H) * length * width;
}

inline BackwardPlan plan_backward(const MaskedAttentionParams& p, bool patterned) {
  BackwardPlan plan;
  bool link_batch = false, link_heads = false;
  const auto link = [&](const View& g) {
    if (g.data == nullptr) return;
    link_batch = link_batch || (p.B > 1 && g.stride[0] == 0);
    link_heads = link_heads || (p.H > 1 && g.stride[1] == 0);
  };
  const int64_t dense = count_elements(p, p.grad_multiplier) + count_elements(p, p.grad_bias);
  int64_t factored = 0;
  link(p.grad_multiplier);
  link(p.grad_bias);
  const Factors* const factors[] = {&p.grad_multiplier_factors, &p.grad_bias_factors};
  for (const Factors* f : factors) {
    link(f->rows);
    link(f->columns);
    link(f->offset);
    factored += count_factor_elements(p, f->rows, p.Lq, f->rank) + count_factor_elements(p, f->columns, p.Lk, f->rank) +
                count_factor_elements(p, f->offset, 1, p.Lk);
  }
  const int64_t pairs = p.B * p.Hkv, threads = p.num_threads;
  // Samples are best worked on in the order in which they lie. Where heads have masks of their own that takes a copy of
  // their gradients a thread, in place of one head at a time: only small ones stay in the cache.
  constexpr int64_t kSmallMask = int64_t{1} << 16;  // elements
  const bool in_order = link_batch && !link_heads && factored == 0 && dense <= kSmallMask && p.B >= threads;
  const bool all_heads = link_heads || (!link_batch && suits_whole_samples(p));
  plan.pairs_per_unit = link_batch && (link_heads || in_order) ? pairs : link_batch ? p.B : all_heads ? p.Hkv : 1;
  plan.head_major = link_batch && !link_heads && !in_order;
  plan.units = pairs / plan.pairs_per_unit;
  if (threads == 1 || (plan.units >= threads && (plan.units % threads == 0 || plan.units >= 4 * threads))) return plan;
  // Groups need rows and columns to share out; copies need memory, and a unit of more than one pair.
  constexpr int64_t kRowsPerGroup = 96, kMaxCopiedElements = int64_t{1} << 24;
  const int64_t most_groups = min64(threads, min64(p.Lq, p.Lk) / kRowsPerGroup);
  const int64_t copies = min64(ceil_div(threads, plan.units), plan.pairs_per_unit);
  const int64_t copied = copies * (dense + factored);
  // samples that share no more than factors are best left whole: the copies are small
  const bool whole_samples = dense == 0 && factored > 0 && plan.units == 1 && copies == threads && p.B % threads == 0;
  if (copies > 1 && (most_groups < threads || whole_samples || in_order) && copied <= kMaxCopiedElements) {
    plan.replicas = copies;
    plan.whole_samples = plan.units == 1 && !plan.head_major && p.B % copies == 0;
  } else if (most_groups > 1) {
    // more groups than threads even the work out, but more of them also pack more
    constexpr int64_t kRowsOfManyGroups = 512;
    const int64_t shorter = min64(p.Lq, p.Lk);
    const bool uneven = patterned && shorter / (2 * most_groups) >= kRowsPerGroup;
    plan.groups = max64(uneven ? 2 * most_groups : most_groups, min64(4 * threads, shorter / kRowsOfManyGroups));
  }
  return plan;
}

}  // namespace
}  // namespace lam
