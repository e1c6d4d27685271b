// The plain structs that the CUDA kernels of masked_attention and of the ops built like it see, and its entry points. No
// torch, no CUDA header.
#pragma once
#include <cstdint>

#include "lam.h"

namespace lam {
namespace cuda {

constexpr int kChunk = 64;           // keys (in the kernel of dK and dV: queries) of one step
constexpr int kMaxStages = 6;        // chunks in shared memory at once
constexpr int kMaxWarps = 4;         // of a block; each owns 16 rows
constexpr int64_t kMaxKeys = 320;    // Lk
constexpr int64_t kMaxHeadDim = 128;
constexpr int kMaxSpecs = 16;        // different patterns in one call
constexpr int kMaxPatternHeads = 256;
constexpr int kMaxSegments = 4;      // pairs of id arrays
constexpr int kRankStep = 16;        // ranks of factors in shared memory at once

struct Device {
  int processors;
  int shared_bytes;            // that one block may have
  int processor_shared_bytes;  // that the blocks of one processor share
};

// Byte offsets in a block's shared memory; -1: not there.
struct Layout {
  int warps, stages, row_slots, chunks, bytes;
  int row_pitch, value_pitch;  // elements from row to row of query and key, of value and grad_out
  int query, grad_out, near_grad_out, key, value;
  int tile_pitch;  // floats
  int multiplier, bias, grad_multiplier, grad_bias;
  int mask_chunks;  // kernel of dK and dV: chunks of queries whose mask tiles are there at once
  int factors;      // kRankStep ranks of the rows of a tile, and of its columns
  int visible, kept, key_visible;
  int weights;        // fp32 only: a warp's 16 x 64 weights on their way to the second product
  int lse, shift, near_lse, near_shift;  // kernel of dK and dV only
};

// The (batch, head) pairs of one mask tile are a unit; a block owns one split of a unit and one block of rows.
struct Slices {
  int share_b, share_h;  // the unit holds every sample, every head
  int units, members, splits, row_blocks;
  int blocks;  // of the launch: units * splits * row_blocks
};

// The gradient of a mask or of a factor: each block's sum goes to partial[part], or, when there is one part, to its place.
struct SummedGradient {
  View grad;  // data null: not wanted
  int parts;
  int64_t elements;
  float* partial;
  int reduction_blocks;  // that add the parts up
};
enum Factor : int { kRowsOrDense = 0, kColumns = 1, kOffset = 2 };
constexpr int kFactors = 3;

// What one group of blocks of the first backward launch does. Two groups where the gradients of multiplier and bias
// are shared by different (batch, head) pairs.
struct RowGroup {
  Slices slices;
  int grad_query, grad_multiplier, grad_bias, writes_shift, needs_keys;
};

// The second, local map of global_local_attention: it has the pattern, the first one sees all keys.
struct NearHalf {
  View out, lse, grad_out;
  int grad_out_aligned;
  float* shift;
};

struct MaskedAttentionCall {
  MaskedAttentionParams p;  // its patterns and segments are not read: they lie on the host
  int n_specs;
  uint8_t spec_of_head[kMaxPatternHeads];
  PatternSpec specs[kMaxSpecs];
  SegmentIds segments[kMaxSegments];

  int query_aligned, key_aligned, value_aligned, grad_out_aligned;  // rows start at multiples of 16 bytes
  int visible_by_b, visible_by_h;                                   // pattern and attn_mask differ by sample, by head
  Layout rows, keys;
  RowGroup group[2];
  Slices key_slices;      // share_h: head-major order of the (batch, key head) pairs
  SummedGradient multiplier[kFactors], bias[kFactors];
  float* shift;  // [B,H,Lq]: delta - grad_lse
  int two_maps;  // every chunk of keys is gone through: the pattern is that of `near`
  NearHalf near;
};

// What a block of rows holds beside the operands: in the first backward launch the gradients of results and masks.
struct RowTiles {
  bool two_maps, backward, grad_multiplier, grad_bias;
};
Layout row_layout(const MaskedAttentionParams& p, const Device& device, const RowTiles& tiles);
Layout key_layout(const MaskedAttentionParams& p, const Device& device, bool two_maps);

// Why these kernels do not take a call, "" when they do. Everything that is not a size was checked before.
const char* masked_attention_limits(const MaskedAttentionParams& p);

Device current_device();

// Bytes of scratch memory that the backward pass needs, zero where nothing does.
int64_t masked_attention_backward_bytes(const MaskedAttentionParams& p, const Device& device);

// One launch, and at most two; on `stream`, without waiting. nullptr on success, otherwise what went wrong.
const char* masked_attention_forward(const MaskedAttentionParams& p, const Device& device, void* stream);
const char* masked_attention_backward(const MaskedAttentionParams& p, const Device& device, void* scratch,
                                      void* stream);

// The same for global_local_attention.
int64_t global_local_attention_backward_bytes(const GlobalLocalAttentionParams& p, const Device& device);
const char* global_local_attention_forward(const GlobalLocalAttentionParams& p, const Device& device, void* stream);
const char* global_local_attention_backward(const GlobalLocalAttentionParams& p, const Device& device, void* scratch,
                                            void* stream);

// Defined by masked_attention_<dtype>.cu and global_local_attention_<dtype>.cu; Width is 64 or 128: what the larger head dim is rounded up to. (A width of 32
// needs fewer registers, but no more blocks would fit a processor.)
template <class T, int Width>
const char* launch_forward(const MaskedAttentionCall& call, void* stream);
template <class T, int Width>
const char* launch_backward(const MaskedAttentionCall& call, void* stream);
template <class T, int Width>
const char* launch_two_map_forward(const MaskedAttentionCall& call, void* stream);
template <class T, int Width>
const char* launch_two_map_backward(const MaskedAttentionCall& call, void* stream);

}  // namespace cuda
}  // namespace lam
