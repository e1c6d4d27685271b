// What the host decides before a launch: sizes of blocks, shared memory, who sums which gradient.
#include <cstring>
#include <initializer_list>

#include "cuda/masked_attention.h"
#include "cuda/plan.h"

namespace lam {
namespace cuda {
namespace {

// Bytes of a mask tile: one row where the mask has one, 8 floats a row where it has one column.
int64_t tile_bytes(const View& mask, int64_t rows, int pitch) {
  return 4 * (mask.stride[2] == 0 ? 1 : rows) * (mask.stride[3] == 0 ? 8 : pitch);
}

bool any_factors(const MaskedAttentionParams& p) { return p.multiplier_factors.rank > 0 || p.bias_factors.rank > 0; }
int64_t staged_bytes(int rows, int columns) { return int64_t{4} * (rows + columns) * (kRankStep + 4); }

Layout lay_out_rows(const MaskedAttentionParams& p, int warps, int stages, const RowTiles& tiles) {
  const int size = element_bytes(p.query.dtype), rows = 16 * warps, chunks = ceil_div(p.Lk, kChunk);
  Layout l;
  std::memset(&l, 0xff, sizeof l);  // -1
  l.warps = warps, l.stages = stages, l.row_slots = stages == 1 ? 1 : 2, l.chunks = chunks;
  l.row_pitch = pitch_of(p.D, p.query.dtype), l.value_pitch = pitch_of(p.Dv, p.query.dtype);
  l.tile_pitch = chunks * kChunk + 8;  // two rows, 4 columns each, in different banks
  Filler f;
  l.query = f.add(static_cast<int64_t>(l.row_slots) * rows * l.row_pitch * size);
  const int64_t value_rows = static_cast<int64_t>(l.row_slots) * rows * l.value_pitch * size;
  if (tiles.backward) l.grad_out = f.add(value_rows);
  if (tiles.backward && tiles.two_maps) l.near_grad_out = f.add(value_rows);
  l.key = f.add(static_cast<int64_t>(stages) * kChunk * l.row_pitch * size);
  l.value = f.add(static_cast<int64_t>(stages) * kChunk * l.value_pitch * size);
  const int64_t whole_tile = int64_t{4} * rows * l.tile_pitch;
  if (p.multiplier.data) l.multiplier = f.add(tile_bytes(p.multiplier, rows, l.tile_pitch));
  if (p.multiplier_factors.rank > 0) l.multiplier = f.add(whole_tile);
  if (p.bias.data) l.bias = f.add(tile_bytes(p.bias, rows, l.tile_pitch));
  if (p.bias_factors.rank > 0) l.bias = f.add(whole_tile);
  if (any_factors(p)) l.factors = f.add(staged_bytes(rows, kChunk));
  if (tiles.grad_multiplier) l.grad_multiplier = f.add(whole_tile);
  if (tiles.grad_bias) l.grad_bias = f.add(whole_tile);
  l.visible = f.add(int64_t{8} * rows * chunks);
  if (p.dropout_p > 0) l.kept = f.add(int64_t{8} * rows * chunks);
  l.key_visible = f.add(int64_t{8} * chunks);
  if (p.query.dtype == DType::f32) l.weights = f.add(int64_t{4} * rows * (kChunk + 4));
  l.bytes = f.bytes;
  return l;
}

Layout lay_out_keys(const MaskedAttentionParams& p, int warps, int stages, bool two_maps, int mask_chunks) {
  const int size = element_bytes(p.query.dtype), rows = 16 * warps;
  Layout l;
  std::memset(&l, 0xff, sizeof l);
  l.warps = warps, l.stages = stages, l.row_slots = stages == 1 ? 1 : 2, l.chunks = ceil_div(p.Lq, kChunk);
  l.row_pitch = pitch_of(p.D, p.query.dtype), l.value_pitch = pitch_of(p.Dv, p.query.dtype);
  l.tile_pitch = rows + 4;  // eight columns of four rows in different banks
  Filler f;
  l.key = f.add(static_cast<int64_t>(l.row_slots) * rows * l.row_pitch * size);
  l.value = f.add(static_cast<int64_t>(l.row_slots) * rows * l.value_pitch * size);
  l.query = f.add(static_cast<int64_t>(stages) * kChunk * l.row_pitch * size);
  l.grad_out = f.add(static_cast<int64_t>(stages) * kChunk * l.value_pitch * size);
  if (two_maps) l.near_grad_out = f.add(static_cast<int64_t>(stages) * kChunk * l.value_pitch * size);
  l.mask_chunks = mask_chunks;
  const int64_t whole_tile = int64_t{4} * mask_chunks * kChunk * l.tile_pitch;
  if (p.multiplier.data) l.multiplier = f.add(tile_bytes(p.multiplier, kChunk, l.tile_pitch));
  if (p.multiplier_factors.rank > 0) l.multiplier = f.add(whole_tile);
  if (p.bias.data) l.bias = f.add(tile_bytes(p.bias, kChunk, l.tile_pitch));
  if (p.bias_factors.rank > 0) l.bias = f.add(whole_tile);
  if (any_factors(p)) l.factors = f.add(staged_bytes(kChunk, rows));
  l.visible = f.add(int64_t{8} * kChunk);
  if (p.dropout_p > 0) l.kept = f.add(int64_t{8} * kChunk);
  l.key_visible = f.add(8);
  if (p.query.dtype == DType::f32) l.weights = f.add(int64_t{4} * rows * (kChunk + 4));
  l.lse = f.add(4 * kChunk), l.shift = f.add(4 * kChunk);
  if (two_maps) l.near_lse = f.add(4 * kChunk), l.near_shift = f.add(4 * kChunk);
  l.bytes = f.bytes;
  return l;
}

// As many rows as a block may have, then as many chunks on chip as fit beside them.
template <class LayOut>
Layout largest(int warps, int stages, const Device& device, const LayOut& lay_out) {
  for (int w = warps; w >= 1; --w)
    for (int s = stages; s >= (w > 1 && stages > 1 ? 2 : 1); --s) {
      const Layout l = lay_out(w, s);
      if (l.bytes <= device.shared_bytes) return l;
    }
  Layout none = lay_out(1, 1);
  none.warps = 0;
  return none;
}

// Blocks enough for every processor, but no more partial sums than members.
int splits_for(int blocks, int members, int shared_bytes, const Device& device) {
  int resident = device.processor_shared_bytes / (shared_bytes + 1024);
  resident = resident < 1 ? 1 : resident > 8 ? 8 : resident;
  const int wanted = ceil_div(static_cast<int64_t>(device.processors) * resident, blocks < 1 ? 1 : blocks);
  return wanted < 1 ? 1 : wanted > members ? members : wanted;
}

Slices slices_of(const MaskedAttentionParams& p, bool share_b, bool share_h, const Layout& l, const Device& device) {
  Slices s;
  s.share_b = share_b, s.share_h = share_h;
  s.units = static_cast<int>((share_b ? 1 : p.B) * (share_h ? 1 : p.H));
  s.members = static_cast<int>((share_b ? p.B : 1) * (share_h ? p.H : 1));
  s.row_blocks = ceil_div(p.Lq, 16 * l.warps);
  s.splits = splits_for(s.units * s.row_blocks, s.members, l.bytes, device);
  s.blocks = s.units * s.splits * s.row_blocks;
  return s;
}

// Along which axes a mask differs, or the gradients that are wanted of it: what shares a tile of it.
struct MaskAxes {
  bool there, b, h;
  explicit MaskAxes(const View& dense) : there(dense.data), b(dense.stride[0] != 0), h(dense.stride[1] != 0) {}
  MaskAxes(const View& dense, const Factors& f) : MaskAxes(dense) {
    if (f.rank > 0) there = true;
    for (const View* v : {&f.rows, &f.columns, &f.offset}) b |= v->stride[0] != 0, h |= v->stride[1] != 0;
  }
  void add(const MaskAxes& other) { b |= other.b, h |= other.h; }
};
MaskAxes leading_mask(const MaskedAttentionParams& p) {
  const MaskAxes multiplier(p.multiplier, p.multiplier_factors);
  return multiplier.there ? multiplier : MaskAxes(p.bias, p.bias_factors);
}
bool any_wanted(const View& dense, const Factors& f) {
  return dense.data || f.rows.data || f.columns.data || f.offset.data;
}

// The pairs that share the tile which costs most to load again: the multiplier's, else the bias's, else, for K and V
// shared by heads, those of one sample.
void sharing_of_operands(const MaskedAttentionParams& p, bool& share_b, bool& share_h) {
  const MaskAxes mask = leading_mask(p);
  share_b = mask.there && !mask.b && p.B > 1;
  share_h = !mask.there || !mask.h || p.H == 1;
}

bool same(const PatternSpec& x, const PatternSpec& y) {
  if (x.n_terms != y.n_terms) return false;
  for (int t = 0; t < x.n_terms; ++t)
    if (x.terms[t].kind != y.terms[t].kind || x.terms[t].end_aligned != y.terms[t].end_aligned ||
        x.terms[t].a != y.terms[t].a || x.terms[t].b != y.terms[t].b)
      return false;
  return true;
}

// The different specs, and which one each head has. -1: too many.
int collect_specs(const MaskedAttentionParams& p, PatternSpec* specs, uint8_t* spec_of_head) {
  int n = 0;
  if (p.n_patterns > kMaxPatternHeads) return -1;
  for (int64_t h = 0; h < p.n_patterns; ++h) {
    int found = 0;
    while (found < n && !same(specs[found], p.patterns[h])) ++found;
    if (found == kMaxSpecs) return -1;
    if (found == n) specs[n++] = p.patterns[h];
    spec_of_head[h] = static_cast<uint8_t>(found);
  }
  return n;
}

}  // namespace

bool fill_call(MaskedAttentionCall& c, const MaskedAttentionParams& p) {
  c.p = p;
  c.p.patterns = nullptr, c.p.segments = nullptr, c.p.parallel_for = nullptr;
  c.n_specs = collect_specs(p, c.specs, c.spec_of_head);
  if (c.n_specs < 0) return false;
  const int size = element_bytes(p.query.dtype);
  c.query_aligned = aligned_rows(p.query, size), c.key_aligned = aligned_rows(p.key, size);
  c.value_aligned = aligned_rows(p.value, size);
  c.visible_by_b = p.attn_mask.data && p.attn_mask.stride[0] != 0;
  c.visible_by_h = (p.attn_mask.data && p.attn_mask.stride[1] != 0) || p.n_patterns > 1;
  for (int s = 0; s < c.n_specs; ++s)
    for (int t = 0; t < c.specs[s].n_terms; ++t) {
      if (c.specs[s].terms[t].kind != PatternKind::segments) continue;
      const int64_t pair = c.specs[s].terms[t].a;
      if (pair >= kMaxSegments) return false;
      c.segments[pair] = p.segments[pair];
      if (c.segments[pair].query_stride_b || c.segments[pair].key_stride_b) c.visible_by_b = 1;
    }
  return true;
}

namespace {

SummedGradient dense_gradient(const View& grad, const MaskedAttentionParams& p, const Slices& slices) {
  SummedGradient g{grad, 0, 1, nullptr, 0};
  if (!grad.data) return g;
  const int64_t sizes[4] = {p.B, p.H, p.Lq, p.Lk};
  for (int axis = 0; axis < 4; ++axis)
    if (grad.stride[axis]) g.elements *= sizes[axis];
  g.parts = slices.splits * (grad.stride[2] ? 1 : slices.row_blocks);
  return g;
}

// A factor's: a part of each unit that shares it, of each split, and of each block of rows where it has none.
SummedGradient factor_gradient(const View& grad, int64_t row_elements, bool has_rows, const MaskedAttentionParams& p,
                               const Slices& slices) {
  SummedGradient g{grad, 0, row_elements, nullptr, 0};
  if (!grad.data) return g;
  const bool b = grad.stride[0] != 0, h = grad.stride[1] != 0;
  g.elements *= (b ? p.B : 1) * (h ? p.H : 1);
  const int64_t units = (slices.share_b || b ? 1 : p.B) * (slices.share_h || h ? 1 : p.H);
  g.parts = static_cast<int>(units) * slices.splits * (has_rows ? 1 : slices.row_blocks);
  return g;
}

void mask_gradients(SummedGradient (&sums)[kFactors], const View& dense, const Factors& f,
                    const MaskedAttentionParams& p, const Slices& slices) {
  sums[kColumns] = factor_gradient(f.columns, p.Lk * f.rank, false, p, slices);
  sums[kOffset] = factor_gradient(f.offset, p.Lk, false, p, slices);
  sums[kRowsOrDense] = f.rows.data ? factor_gradient(f.rows, p.Lq * f.rank, true, p, slices)
                                   : dense_gradient(dense, p, slices);
}

// False: a block's tiles fit nowhere.
bool plan_backward(MaskedAttentionCall& c, const Device& device) {
  const MaskedAttentionParams& p = c.p;
  const int size = element_bytes(p.query.dtype);
  c.grad_out_aligned = aligned_rows(p.grad_out, size), c.near.grad_out_aligned = aligned_rows(c.near.grad_out, size);
  const Factors &fm = p.grad_multiplier_factors, &fb = p.grad_bias_factors;
  const bool two_maps = c.two_maps, gm = any_wanted(p.grad_multiplier, fm), gb = any_wanted(p.grad_bias, fb);
  const bool gq = p.grad_query.data, gk = p.grad_key.data, gv = p.grad_value.data;
  // a gradient of factors is folded with them: what they differ along counts as well
  MaskAxes of_multiplier(p.grad_multiplier, fm), of_bias(p.grad_bias, fb);
  of_multiplier.add(MaskAxes({}, p.multiplier_factors)), of_bias.add(MaskAxes({}, p.bias_factors));
  bool apart = gm && gb && (of_multiplier.b != of_bias.b || of_multiplier.h != of_bias.h);
  c.rows = row_layout(p, device, {two_maps, true, gm, gb && !apart});
  if (c.rows.warps == 0 && gm && gb) c.rows = row_layout(p, device, {two_maps, true, true, false}), apart = true;
  if (apart) c.rows.grad_bias = c.rows.grad_multiplier;  // no block sums both
  c.keys = key_layout(p, device, two_maps);
  if (c.rows.warps == 0 || c.keys.warps == 0) return false;
  bool share_b, share_h;
  sharing_of_operands(p, share_b, share_h);
  const MaskAxes& first = gm ? of_multiplier : of_bias;
  if (gm || gb) share_b = !first.b, share_h = !first.h;
  c.group[0] = {slices_of(p, share_b, share_h, c.rows, device), gq, gm, gb && !apart, gk, gq || gm || gb};
  c.group[1] = {};
  if (!c.group[0].needs_keys && !gk) c.group[0].slices.blocks = 0;
  if (apart)
    c.group[1] = {slices_of(p, !of_bias.b, !of_bias.h, c.rows, device), 0, 0, 1, 0, 1};
  mask_gradients(c.multiplier, p.grad_multiplier, fm, p, c.group[0].slices);
  mask_gradients(c.bias, p.grad_bias, fb, p, c.group[apart ? 1 : 0].slices);

  c.key_slices = {};
  if (gk || gv) {
    Slices& s = c.key_slices;
    const MaskAxes mask = leading_mask(p);
    s.share_h = mask.there && !mask.b && mask.h;
    s.units = 1, s.members = static_cast<int>(p.B * p.Hkv);
    s.row_blocks = ceil_div(p.Lk, 16 * c.keys.warps);
    s.splits = splits_for(s.row_blocks, s.members, c.keys.bytes, device);
    s.blocks = s.splits * s.row_blocks;
  }
  return true;
}

int64_t scratch_floats(const MaskedAttentionCall& c) {
  int64_t floats = c.group[0].writes_shift ? (1 + c.two_maps) * padded(c.p.B * c.p.H * c.p.Lq) : 0;
  for (const auto* sums : {&c.multiplier, &c.bias})
    for (const SummedGradient& g : *sums)
      if (g.parts > 1) floats += padded(g.parts * g.elements);
  return floats;
}

// Gives a launch its place in the scratch memory.
void place_scratch(MaskedAttentionCall& c, float* free) {
  const int64_t rows = padded(c.p.B * c.p.H * c.p.Lq);
  if (c.group[0].writes_shift) c.shift = free, free += rows;
  if (c.group[0].writes_shift && c.two_maps) c.near.shift = free, free += rows;
  for (auto* sums : {&c.multiplier, &c.bias})
    for (SummedGradient& g : *sums) {
      if (g.parts <= 1) continue;
      g.partial = free, free += padded(g.parts * g.elements);
      g.reduction_blocks = ceil_div(g.elements, 32 * c.keys.warps);
    }
}

// What is launched, for each dtype and width.
struct Forward {
  template <class T, int Width>
  static const char* run(const MaskedAttentionCall& c, void* stream) {
    return c.two_maps ? launch_two_map_forward<T, Width>(c, stream) : launch_forward<T, Width>(c, stream);
  }
};
struct Backward {
  template <class T, int Width>
  static const char* run(const MaskedAttentionCall& c, void* stream) {
    return c.two_maps ? launch_two_map_backward<T, Width>(c, stream) : launch_backward<T, Width>(c, stream);
  }
};
const char* plan_and_run_forward(MaskedAttentionCall& c, const Device& device, void* stream) {
  c.rows = row_layout(c.p, device, {c.two_maps != 0, false, false, false});
  if (c.rows.warps == 0) return kNoRoom;
  bool share_b, share_h;
  sharing_of_operands(c.p, share_b, share_h);
  c.group[0].slices = slices_of(c.p, share_b, share_h, c.rows, device);
  return run<Forward>(c.p, c, stream);
}

const char* plan_and_run_backward(MaskedAttentionCall& c, const Device& device, void* scratch, void* stream) {
  if (!plan_backward(c, device)) return kNoRoom;
  place_scratch(c, static_cast<float*>(scratch));
  return run<Backward>(c.p, c, stream);
}

// The global half has the operands, the local one the pattern.
bool fill_call(MaskedAttentionCall& c, const GlobalLocalAttentionParams& p) {
  MaskedAttentionParams both = p;
  both.n_patterns = p.local.n_patterns, both.patterns = p.local.patterns, both.segments = p.local.segments;
  c.two_maps = 1, c.near = {p.local.out, p.local.lse, p.local.grad_out, 0, nullptr};
  return fill_call(c, both);
}

}  // namespace

Layout row_layout(const MaskedAttentionParams& p, const Device& device, const RowTiles& tiles) {
  // one chunk more than there are, so that the next head's first one is on its way
  const int stages = ceil_div(p.Lk, kChunk) + 1;
  return largest(row_warps(p.Lq), stages, device,
                 [&](int warps, int stages) { return lay_out_rows(p, warps, stages, tiles); });
}

Layout key_layout(const MaskedAttentionParams& p, const Device& device, bool two_maps) {
  auto layout = [&](int mask_chunks) {
    return largest(row_warps(p.Lk), 2, device,
                   [&](int warps, int stages) { return lay_out_keys(p, warps, stages, two_maps, mask_chunks); });
  };
  // tiles of factors for all queries, fewer keys a block if need be: else they are built for every head
  if (any_factors(p) && p.Lq <= kMaxKeys) {
    const Layout l = layout(ceil_div(p.Lq, kChunk));
    if (l.warps > 0) return l;
  }
  return layout(1);
}

const char* masked_attention_limits(const MaskedAttentionParams& p) {
  if (p.query.dtype == DType::f64) return "has no float64";
  if (p.Lk > kMaxKeys) return "serves at most 320 keys";
  if (p.D > kMaxHeadDim || p.Dv > kMaxHeadDim) return "serves head dims of at most 128";
  PatternSpec specs[kMaxSpecs];
  uint8_t heads[kMaxPatternHeads];
  const int n = collect_specs(p, specs, heads);
  if (n < 0) return "serves at most 16 different patterns, one a head for at most 256 heads";
  for (int s = 0; s < n; ++s)
    for (int t = 0; t < specs[s].n_terms; ++t)
      if (specs[s].terms[t].kind == PatternKind::segments && specs[s].terms[t].a >= kMaxSegments)
        return "serves at most 4 pairs of segment ids";
  return "";
}

namespace {

// Of either op.
template <class Params>
int64_t bytes_of(const Params& p, const Device& device) {
  MaskedAttentionCall c{};
  return fill_call(c, p) && plan_backward(c, device) ? 4 * scratch_floats(c) : 0;
}
template <class Params>
const char* forward_of(const Params& p, const Device& device, void* stream) {
  MaskedAttentionCall c{};
  return fill_call(c, p) ? plan_and_run_forward(c, device, stream) : kTooMany;
}
template <class Params>
const char* backward_of(const Params& p, const Device& device, void* scratch, void* stream) {
  MaskedAttentionCall c{};
  return fill_call(c, p) ? plan_and_run_backward(c, device, scratch, stream) : kTooMany;
}

}  // namespace

int64_t masked_attention_backward_bytes(const MaskedAttentionParams& p, const Device& device) {
  return bytes_of(p, device);
}
const char* masked_attention_forward(const MaskedAttentionParams& p, const Device& device, void* stream) {
  return forward_of(p, device, stream);
}
const char* masked_attention_backward(const MaskedAttentionParams& p, const Device& device, void* scratch,
                                      void* stream) {
  return backward_of(p, device, scratch, stream);
}
int64_t global_local_attention_backward_bytes(const GlobalLocalAttentionParams& p, const Device& device) {
  return bytes_of(p, device);
}
const char* global_local_attention_forward(const GlobalLocalAttentionParams& p, const Device& device, void* stream) {
  return forward_of(p, device, stream);
}
const char* global_local_attention_backward(const GlobalLocalAttentionParams& p, const Device& device, void* scratch,
                                            void* stream) {
  return backward_of(p, device, scratch, stream);
}

}  // namespace cuda
}  // namespace lam
