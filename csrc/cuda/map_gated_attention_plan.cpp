// What the host decides before map_gated_attention is launched.
#include <cstring>

#include "cuda/map_gated_attention.h"
#include "cuda/plan.h"

namespace lam {
namespace cuda {
namespace {

struct MapGatedForward {
  template <class T, int Width>
  static const char* run(const MapGatedCall& c, void* stream) {
    return launch_map_gated_forward<T, Width>(c, stream);
  }
};
struct MapGatedBackward {
  template <class T, int Width>
  static const char* run(const MapGatedCall& c, void* stream) {
    return launch_map_gated_backward<T, Width>(c, stream);
  }
};

// As many rows as a block may have and as fit.
MapGateLayout map_gate_layout(const MaskedAttentionParams& p, const Device& device, bool backward) {
  const int size = element_bytes(p.query.dtype);
  const int64_t keys = round_up(p.Lk, kChunk);
  MapGateLayout l;
  for (int warps = row_warps(p.Lq); warps >= 1; --warps) {
    const int rows = 16 * warps;
    std::memset(&l, 0xff, sizeof l);  // -1
    l.warps = warps;
    l.row_pitch = pitch_of(p.D, p.query.dtype), l.value_pitch = pitch_of(p.Dv, p.query.dtype);
    l.gate_pitch = pitch_of(kChunk, p.query.dtype), l.plane_pitch = static_cast<int>(keys) + 8;
    Filler f;
    l.query = f.add(int64_t{1} * rows * l.row_pitch * size);
    if (backward) l.grad_out = f.add(int64_t{1} * rows * l.value_pitch * size);
    l.chunk = f.add(int64_t{kChunk} * (l.row_pitch > l.value_pitch ? l.row_pitch : l.value_pitch) * size);
    l.gate = f.add(int64_t{kChunk} * l.gate_pitch * size);
    const int64_t plane = int64_t{4} * rows * l.plane_pitch;
    l.whole = f.add(plane), l.near = f.add(plane);
    if (backward) l.gates = f.add(plane), l.slopes = f.add(plane), l.inverse = f.add(4 * rows);
    l.visible = f.add(rows * keys / 8), l.key_visible = f.add(keys / 8);
    if (p.query.dtype == DType::f32) l.weights = f.add(int64_t{4} * rows * (kChunk + 4));
    l.bytes = f.bytes;
    if (l.bytes <= device.shared_bytes) return l;
  }
  l.warps = 0;
  return l;
}

// nullptr, or why it cannot run.
const char* fill_call(MapGatedCall& call, const MapGatedAttentionParams& p, const Device& device, bool backward) {
  if (!fill_call(call.c, p)) return kTooMany;
  call.c.grad_out_aligned = aligned_rows(p.grad_out, element_bytes(p.query.dtype));
  call.gate[0] = p.gate_global, call.gate[1] = p.gate_local;
  call.grad_gate[0] = p.grad_gate_global, call.grad_gate[1] = p.grad_gate_local;
  call.renormalise = p.renormalise;
  call.layout = map_gate_layout(p, device, backward);
  if (call.layout.warps == 0) return kNoRoom;
  call.row_blocks = ceil_div(p.Lq, 16 * call.layout.warps);
  const int pairs = static_cast<int>(p.B * p.H);
  call.blocks = backward ? pairs : pairs * call.row_blocks;
  if (!backward) return nullptr;
  // a part of the gates' gradients for each block: never as many as there are maps
  const bool gates = p.grad_gate_global.data || p.grad_gate_local.data;
  const int most = gates && ceil_div(pairs, 4) < device.processors ? ceil_div(pairs, 4) : device.processors;
  if (call.blocks > most) call.blocks = most;
  return nullptr;
}

// Floats of scratch memory of dK and dV, and of the gates' gradients.
int64_t row_sum_floats(const MapGatedCall& call) {
  const MaskedAttentionParams& p = call.c.p;
  const bool wanted = (p.grad_key.data || p.grad_value.data) && call.row_blocks > 1;
  return wanted ? padded(call.blocks * p.Lk * (p.D + p.Dv)) : 0;
}
int64_t gate_part_floats(const MapGatedCall& call) {
  const bool wanted = call.grad_gate[0].data || call.grad_gate[1].data;
  return wanted ? padded(call.blocks * 2 * call.c.p.Lk * call.c.p.Lk) : 0;
}

}  // namespace

int64_t map_gated_attention_backward_bytes(const MapGatedAttentionParams& p, const Device& device) {
  MapGatedCall call{};
  return fill_call(call, p, device, true) ? 0 : 4 * (row_sum_floats(call) + gate_part_floats(call));
}

const char* map_gated_attention_forward(const MapGatedAttentionParams& p, const Device& device, void* stream) {
  MapGatedCall call{};
  const char* error = fill_call(call, p, device, false);
  return error ? error : run<MapGatedForward>(p, call, stream);
}

const char* map_gated_attention_backward(const MapGatedAttentionParams& p, const Device& device, void* scratch,
                                         void* stream) {
  MapGatedCall call{};
  if (const char* error = fill_call(call, p, device, true)) return error;
  float* free = static_cast<float*>(scratch);
  if (row_sum_floats(call) > 0) call.row_sums = free, free += row_sum_floats(call);
  if (gate_part_floats(call) > 0) call.gate_parts = free;
  return run<MapGatedBackward>(p, call, stream);
}

}  // namespace cuda
}  // namespace lam
