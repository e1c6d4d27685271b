// What the host decides before a launch: sizes of blocks, shared memory, who sums which gradient.
#include <cstring>
#include <initializer_list>

#include "cuda/masked_attention.h"
#include "cuda/plan.h"

namespace lam {
namespace cuda {
namespace {

int ceil_div(int64_t x, int64_t y) { return static_cast<int>((x + y - 1) / y); }
int round_up(int64_t x, int64_t y) { return ceil_div(x, y) * static_cast<int>(y); }

int element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// An odd number of 16-byte steps: eight rows then lie in eight different groups of banks.
int pitch_of(int64_t width, DType dtype) { return round_up(width, 16) + 16 / element_bytes(dtype); }

struct Filler {
  int bytes = 0;
  int add(int64_t wanted) {
    const int at = bytes;
    bytes += round_up(wanted, 16);
    return at;
  }
};

// Rows over equally large blocks of at most 16 * kMaxWarps.
int row_warps(int64_t rows) { return ceil_div(ceil_div(rows, ceil_div(rows, 16 * kMaxWarps)), 16); }

// A mask tile: one row where the mask has one, 8 floats a row where it has one column.
int64_t tile_floats(const View& mask, int rows, int pitch) {
  return (mask.stride[2] == 0 ? 1 : rows) * static_cast<int64_t>(mask.stride[3] == 0 ? 8 : pitch);
}

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
  if (p.multiplier.data) l.multiplier = f.add(4 * tile_floats(p.multiplier, rows, l.tile_pitch));
  if (p.bias.data) l.bias = f.add(4 * tile_floats(p.bias, rows, l.tile_pitch));
  if (tiles.grad_multiplier) l.grad_multiplier = f.add(int64_t{4} * rows * l.tile_pitch);
  if (tiles.grad_bias) l.grad_bias = f.add(int64_t{4} * rows * l.tile_pitch);
  l.visible = f.add(int64_t{8} * rows * chunks);
  if (p.dropout_p > 0) l.kept = f.add(int64_t{8} * rows * chunks);
  l.key_visible = f.add(int64_t{8} * chunks);
  if (p.query.dtype == DType::f32) l.weights = f.add(int64_t{4} * rows * (kChunk + 4));
  l.bytes = f.bytes;
  return l;
}

Layout lay_out_keys(const MaskedAttentionParams& p, int warps, int stages, bool two_maps) {
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
  if (p.multiplier.data) l.multiplier = f.add(4 * tile_floats(p.multiplier, kChunk, l.tile_pitch));
  if (p.bias.data) l.bias = f.add(4 * tile_floats(p.bias, kChunk, l.tile_pitch));
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

// The pairs that share the tile which costs most to load again: the multiplier's, else the bias's, else, for K and V
// shared by heads, those of one sample.
void sharing_of_operands(const MaskedAttentionParams& p, bool& share_b, bool& share_h) {
  const View& mask = p.multiplier.data ? p.multiplier : p.bias;
  share_b = mask.data && (mask.stride[0] == 0 || p.B == 1) && p.B > 1;
  share_h = !mask.data || mask.stride[1] == 0 || p.H == 1;
}

bool aligned_rows(const View& v, int size) {
  auto whole = [&](int64_t stride) { return stride * size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && whole(v.stride[0]) && whole(v.stride[1]) &&
         whole(v.stride[2]);
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

MaskGradient mask_gradient(const View& grad, const MaskedAttentionParams& p, const Slices& slices) {
  MaskGradient g{};
  if (!grad.data) return g;
  g.wanted = 1, g.elements = 1;
  const int64_t sizes[4] = {p.B, p.H, p.Lq, p.Lk};
  for (int axis = 0; axis < 4; ++axis)
    if (grad.stride[axis]) g.elements *= sizes[axis];
  g.parts = slices.splits * (grad.stride[2] ? 1 : slices.row_blocks);
  return g;
}

// False: a block's tiles fit nowhere.
bool plan_backward(MaskedAttentionCall& c, const Device& device) {
  const MaskedAttentionParams& p = c.p;
  const int size = element_bytes(p.query.dtype);
  c.grad_out_aligned = aligned_rows(p.grad_out, size), c.near.grad_out_aligned = aligned_rows(c.near.grad_out, size);
  const bool two_maps = c.two_maps, gm = p.grad_multiplier.data, gb = p.grad_bias.data, gq = p.grad_query.data;
  const bool gk = p.grad_key.data, gv = p.grad_value.data;
  auto shared = [&](const View& grad, int axis) { return grad.stride[axis] == 0; };
  bool apart = gm && gb && (shared(p.grad_multiplier, 0) != shared(p.grad_bias, 0) ||
                            shared(p.grad_multiplier, 1) != shared(p.grad_bias, 1));
  c.rows = row_layout(p, device, {two_maps, true, gm, gb && !apart});
  if (c.rows.warps == 0 && gm && gb) c.rows = row_layout(p, device, {two_maps, true, true, false}), apart = true;
  if (apart) c.rows.grad_bias = c.rows.grad_multiplier;  // no block sums both
  c.keys = key_layout(p, device, two_maps);
  if (c.rows.warps == 0 || c.keys.warps == 0) return false;
  bool share_b, share_h;
  sharing_of_operands(p, share_b, share_h);
  if (gm || gb) {
    const View& grad = gm ? p.grad_multiplier : p.grad_bias;
    share_b = shared(grad, 0), share_h = shared(grad, 1);
  }
  c.group[0] = {slices_of(p, share_b, share_h, c.rows, device), gq, gm, gb && !apart, gk, gq || gm || gb};
  c.group[1] = {};
  if (!c.group[0].needs_keys && !gk) c.group[0].slices.blocks = 0;
  if (apart)
    c.group[1] = {slices_of(p, shared(p.grad_bias, 0), shared(p.grad_bias, 1), c.rows, device), 0, 0, 1, 0, 1};
  c.multiplier = mask_gradient(p.grad_multiplier, p, c.group[0].slices);
  c.bias = mask_gradient(p.grad_bias, p, c.group[apart ? 1 : 0].slices);

  c.key_slices = {};
  if (gk || gv) {
    Slices& s = c.key_slices;
    const View& mask = p.multiplier.data ? p.multiplier : p.bias;
    s.share_h = mask.data && mask.stride[0] == 0 && mask.stride[1] != 0;
    s.units = 1, s.members = static_cast<int>(p.B * p.Hkv);
    s.row_blocks = ceil_div(p.Lk, 16 * c.keys.warps);
    s.splits = splits_for(s.row_blocks, s.members, c.keys.bytes, device);
    s.blocks = s.splits * s.row_blocks;
  }
  return true;
}

int64_t padded(int64_t floats) { return (floats + 63) / 64 * 64; }

int64_t scratch_floats(const MaskedAttentionCall& c) {
  int64_t floats = c.group[0].writes_shift ? (1 + c.two_maps) * padded(c.p.B * c.p.H * c.p.Lq) : 0;
  for (const MaskGradient* g : {&c.multiplier, &c.bias})
    if (g->parts > 1) floats += padded(g->parts * g->elements);
  return floats;
}

// Gives a launch its place in the scratch memory.
void place_scratch(MaskedAttentionCall& c, float* free) {
  const int64_t rows = padded(c.p.B * c.p.H * c.p.Lq);
  if (c.group[0].writes_shift) c.shift = free, free += rows;
  if (c.group[0].writes_shift && c.two_maps) c.near.shift = free, free += rows;
  MaskGradient* const gradients[2] = {&c.multiplier, &c.bias};
  for (int k = 0; k < 2; ++k) {
    MaskGradient& g = *gradients[k];
    if (g.parts <= 1) continue;
    g.partial = free, free += padded(g.parts * g.elements);
    c.reduction_blocks[k] = ceil_div(g.elements, 32 * c.keys.warps);
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
template <class Direction, int Width>
const char* run_for_dtype(const MaskedAttentionCall& c, void* stream) {
  switch (c.p.query.dtype) {
    case DType::f32:
      return Direction::template run<float, Width>(c, stream);
    case DType::bf16:
      return Direction::template run<Bf16, Width>(c, stream);
    default:
      return Direction::template run<Half, Width>(c, stream);
  }
}
template <class Direction>
const char* run(const MaskedAttentionCall& c, void* stream) {
  const int64_t width = c.p.D > c.p.Dv ? c.p.D : c.p.Dv;
  return width <= 64 ? run_for_dtype<Direction, 64>(c, stream) : run_for_dtype<Direction, 128>(c, stream);
}

constexpr const char* kNoRoom = "a block's tiles do not fit the shared memory of this GPU";
constexpr const char* kTooMany = "the patterns do not fit a kernel's parameters";

const char* plan_and_run_forward(MaskedAttentionCall& c, const Device& device, void* stream) {
  c.rows = row_layout(c.p, device, {c.two_maps != 0, false, false, false});
  if (c.rows.warps == 0) return kNoRoom;
  bool share_b, share_h;
  sharing_of_operands(c.p, share_b, share_h);
  c.group[0].slices = slices_of(c.p, share_b, share_h, c.rows, device);
  return run<Forward>(c, stream);
}

const char* plan_and_run_backward(MaskedAttentionCall& c, const Device& device, void* scratch, void* stream) {
  if (!plan_backward(c, device)) return kNoRoom;
  place_scratch(c, static_cast<float*>(scratch));
  return run<Backward>(c, stream);
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
  return largest(row_warps(p.Lk), 2, device,
                 [&](int warps, int stages) { return lay_out_keys(p, warps, stages, two_maps); });
}

const char* masked_attention_limits(const MaskedAttentionParams& p) {
  if (p.query.dtype == DType::f64) return "has no float64";
  if (p.Lk > kMaxKeys) return "serves at most 320 keys";
  if (p.D > kMaxHeadDim || p.Dv > kMaxHeadDim) return "serves head dims of at most 128";
  if (p.multiplier_factors.rank > 0 || p.bias_factors.rank > 0) return "takes no low-rank mask";
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

int64_t masked_attention_backward_bytes(const MaskedAttentionParams& p, const Device& device) {
  MaskedAttentionCall c{};
  return fill_call(c, p) && plan_backward(c, device) ? 4 * scratch_floats(c) : 0;
}

const char* masked_attention_forward(const MaskedAttentionParams& p, const Device& device, void* stream) {
  MaskedAttentionCall c{};
  return fill_call(c, p) ? plan_and_run_forward(c, device, stream) : kTooMany;
}

const char* masked_attention_backward(const MaskedAttentionParams& p, const Device& device, void* scratch,
                                      void* stream) {
  MaskedAttentionCall c{};
  return fill_call(c, p) ? plan_and_run_backward(c, device, scratch, stream) : kTooMany;
}

int64_t global_local_attention_backward_bytes(const GlobalLocalAttentionParams& p, const Device& device) {
  MaskedAttentionCall c{};
  return fill_call(c, p) && plan_backward(c, device) ? 4 * scratch_floats(c) : 0;
}

const char* global_local_attention_forward(const GlobalLocalAttentionParams& p, const Device& device, void* stream) {
  MaskedAttentionCall c{};
  return fill_call(c, p) ? plan_and_run_forward(c, device, stream) : kTooMany;
}

const char* global_local_attention_backward(const GlobalLocalAttentionParams& p, const Device& device, void* scratch,
                                            void* stream) {
  MaskedAttentionCall c{};
  return fill_call(c, p) ? plan_and_run_backward(c, device, scratch, stream) : kTooMany;
}

}  // namespace cuda
}  // namespace lam
