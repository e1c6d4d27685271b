// The plain struct that the CUDA kernels of map_gated_attention see, and their entry points.
#pragma once
#include "cuda/masked_attention.h"

namespace lam {
namespace cuda {

// Byte offsets in a block's shared memory; -1: not there.
struct MapGateLayout {
  int warps, bytes;
  int row_pitch, value_pitch, gate_pitch;  // elements
  int plane_pitch;                         // floats
  int query, grad_out, chunk, gate;        // chunk: 64 rows of key or value
  int whole, near, gates, slopes;          // planes: the block's rows x all keys, fp32
  int visible, key_visible, inverse, weights;
};

struct MapGatedCall {
  MaskedAttentionCall c;  // operands, patterns, alignment; its plan is not used
  View gate[2], grad_gate[2];  // global, local
  int renormalise;
  MapGateLayout layout;
  int blocks, row_blocks;
  float* row_sums;   // of each block dK and dV of its pair, where rows come in several blocks
  float* gate_parts;  // of each block both gates' gradients
};

const char* map_gated_attention_forward(const MapGatedAttentionParams& p, const Device& device, void* stream);
const char* map_gated_attention_backward(const MapGatedAttentionParams& p, const Device& device, void* scratch,
                                         void* stream);
int64_t map_gated_attention_backward_bytes(const MapGatedAttentionParams& p, const Device& device);

// Defined by map_gated_attention_<dtype>.cu.
template <class T, int Width>
const char* launch_map_gated_forward(const MapGatedCall& call, void* stream);
template <class T, int Width>
const char* launch_map_gated_backward(const MapGatedCall& call, void* stream);

}  // namespace cuda
}  // namespace lam
