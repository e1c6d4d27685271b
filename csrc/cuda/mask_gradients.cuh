// The gradient of a mask on its way from a block's tile to its place: summed on chip over the block's pairs, each element
// always by the same lane, and in parts over blocks, part after part.
#pragma once
#include "cuda/row_blocks.cuh"

namespace lam {
namespace cuda {
namespace {

__device__ __forceinline__ void add_to_tile(float* to, float x, float y) {
  float2* sum = reinterpret_cast<float2*>(to);
  const float2 old = ptx::shared_load(sum);
  ptx::shared_store(sum, make_float2(old.x + x, old.y + y));
}

__device__ __forceinline__ void store_gradient(const View& grad, const MaskGradient& g, int part, int64_t index,
                                               float value) {
  if (g.parts > 1) g.partial[part * g.elements + index] = value;
  else if (grad.dtype == DType::f32) static_cast<float*>(grad.data)[index] = value;
  else if (grad.dtype == DType::bf16)
    static_cast<__nv_bfloat16*>(grad.data)[index] = from_float<__nv_bfloat16>(value);
  else static_cast<__half*>(grad.data)[index] = from_float<__half>(value);
}

// The block's sum of a mask gradient leaves the chip; the axes along which the mask has one value are added up.
__device__ __forceinline__ void finish_mask_gradient(float* tile, const View& grad, const MaskGradient& g,
                                                     const RowWalk& walk, int tile_pitch, const Threads& threads) {
  const MaskedAttentionParams& p = walk.c.p;
  const Slices& s = walk.slices;
  const int H = static_cast<int>(p.H), Lk = static_cast<int>(p.Lk), rows = walk.last_row - walk.first_row + 1;
  const int b = s.share_b ? 0 : s.share_h ? walk.unit : walk.unit / H;
  const int h = s.share_h ? 0 : s.share_b ? walk.unit : walk.unit % H;
  const int64_t base = b * grad.stride[0] + h * grad.stride[1];
  const bool one_row = grad.stride[2] == 0, one_column = grad.stride[3] == 0;
  const int part = one_row ? walk.split * s.row_blocks + walk.row_block : walk.split;
  __syncthreads();
  if (one_column) {
    for (int r = threads.id; r < rows; r += threads.count) {
      float sum = 0.f;
      for (int j = 0; j < Lk; ++j) sum += tile[r * tile_pitch + j];
      tile[r * tile_pitch] = sum;
    }
    __syncthreads();
  }
  const int columns = one_column ? 1 : Lk;
  if (one_row) {
    for (int j = threads.id; j < columns; j += threads.count) {
      float sum = 0.f;
      for (int r = 0; r < rows; ++r) sum += tile[r * tile_pitch + j];
      store_gradient(grad, g, part, base + j * grad.stride[3], sum);
    }
    return;
  }
  for (int k = threads.id; k < rows * columns; k += threads.count) {
    const int r = k / columns, j = k - r * columns;
    store_gradient(grad, g, part, base + (walk.first_row + r) * grad.stride[2] + j * grad.stride[3],
                   tile[r * tile_pitch + j]);
  }
}

// A block of the first backward launch: what its group of blocks does, and its sums of mask gradients.
struct RowGradients {
  const MaskedAttentionCall& c;
  const RowGroup& group;
  int block;  // within the group
  float *multiplier, *bias;

  __device__ __forceinline__ RowGradients(const MaskedAttentionCall& call, int launched, unsigned char* memory,
                                          const Threads& threads)
      : c(call),
        group(call.group[launched < call.group[0].slices.blocks ? 0 : 1]),
        block(launched < call.group[0].slices.blocks ? launched : launched - call.group[0].slices.blocks),
        multiplier(group.grad_multiplier ? at<float>(memory, call.rows.grad_multiplier) : nullptr),
        bias(group.grad_bias ? at<float>(memory, call.rows.grad_bias) : nullptr) {
    for (int k = threads.id; k < 16 * c.rows.warps * c.rows.tile_pitch; k += threads.count) {
      if (multiplier) multiplier[k] = 0.f;
      if (bias) bias[k] = 0.f;
    }
  }
  // Of a lane's pairs of eight keys: gradients of the multiplier and of the bias.
  __device__ __forceinline__ void add(int row, int column, const float (&of_multiplier)[4],
                                      const float (&of_bias)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int to = (row + 8 * half) * c.rows.tile_pitch + column;
      if (multiplier) add_to_tile(multiplier + to, of_multiplier[2 * half], of_multiplier[2 * half + 1]);
      if (bias) add_to_tile(bias + to, of_bias[2 * half], of_bias[2 * half + 1]);
    }
  }
  __device__ __forceinline__ void finish(const RowWalk& now, const Threads& threads) const {
    const int pitch = c.rows.tile_pitch;
    if (multiplier) finish_mask_gradient(multiplier, c.p.grad_multiplier, c.multiplier, now, pitch, threads);
    if (bias) finish_mask_gradient(bias, c.p.grad_bias, c.bias, now, pitch, threads);
  }
};

__device__ __forceinline__ void add_parts(const View& grad, MaskGradient g, int block, const Threads& threads) {
  const int64_t index = static_cast<int64_t>(block) * threads.count + threads.id;
  if (index >= g.elements) return;
  float sum = 0.f;
  for (int part = 0; part < g.parts; ++part) sum += g.partial[part * g.elements + index];
  g.parts = 1;
  store_gradient(grad, g, 0, index, sum);
}

// The blocks of the second launch behind those that own keys: whether this is one, and then its work is done.
__device__ __forceinline__ bool is_reduction(const MaskedAttentionCall& c, const Threads& threads) {
  const int block = static_cast<int>(blockIdx.x) - c.key_slices.blocks;
  if (block < 0) return false;
  if (block < c.reduction_blocks[0]) add_parts(c.p.grad_multiplier, c.multiplier, block, threads);
  else add_parts(c.p.grad_bias, c.bias, block - c.reduction_blocks[0], threads);
  return true;
}

}  // namespace
}  // namespace cuda
}  // namespace lam
