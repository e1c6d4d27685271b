// The gradient of a mask on its way from a block's tile to its place: summed on chip over the block's pairs, each element
// always by the same lane, and in parts over blocks, part after part.
#pragma once
#include "cuda/row_blocks.cuh"

namespace lam {
namespace cuda {
namespace {

__device__ __forceinline__ void store_gradient(const SummedGradient& g, int part, int64_t index, float value) {
  if (g.parts > 1) g.partial[part * g.elements + index] = value;
  else store_mask_value(g.grad, index, value);
}

// The sample and head of a unit; 0 where it holds all of them.
struct UnitOf {
  int b, h;
  __device__ __forceinline__ explicit UnitOf(const RowWalk& walk) {
    const Slices& s = walk.slices;
    const int H = static_cast<int>(walk.c.p.H);
    b = s.share_b ? 0 : s.share_h ? walk.unit : walk.unit / H;
    h = s.share_h ? 0 : s.share_b ? walk.unit : walk.unit % H;
  }
};

// The block's sum of a dense mask's gradient leaves the chip; the axes along which the mask has one value are added up.
__device__ __forceinline__ void finish_mask_gradient(float* tile, const SummedGradient& g, const RowWalk& walk,
                                                     int tile_pitch, const Threads& threads) {
  const View& grad = g.grad;
  const Slices& s = walk.slices;
  const int Lk = static_cast<int>(walk.c.p.Lk), rows = walk.last_row - walk.first_row + 1;
  const UnitOf unit(walk);
  const int64_t base = unit.b * grad.stride[0] + unit.h * grad.stride[1];
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
      store_gradient(g, part, base + j * grad.stride[3], sum);
    }
    return;
  }
  for (int k = threads.id; k < rows * columns; k += threads.count) {
    const int r = k / columns, j = k - r * columns;
    store_gradient(g, part, base + (walk.first_row + r) * grad.stride[2] + j * grad.stride[3],
                   tile[r * tile_pitch + j]);
  }
}

// The block's sum of the gradient of a mask given by factors, folded into theirs. A factor that units share gets a part
// of each.
__device__ __forceinline__ void fold_mask_gradient(const float* tile, const Factors& f,
                                                   const SummedGradient (&sums)[kFactors], const RowWalk& walk,
                                                   const Layout& l, float* stage, const Threads& threads) {
  const MaskedAttentionParams& p = walk.c.p;
  const Slices& s = walk.slices;
  const int B = static_cast<int>(p.B), H = static_cast<int>(p.H), Lq = static_cast<int>(p.Lq);
  const int Lk = static_cast<int>(p.Lk), rows = 16 * l.warps, warp_row = 16 * threads.warp;
  const UnitOf unit(walk);
  const Lane lane(threads.id);
  auto part_of = [&](const View& grad) {
    int part = 0;
    if (!s.share_b && grad.stride[0] == 0 && B > 1) part = unit.b;
    if (!s.share_h && grad.stride[1] == 0 && H > 1) part = part * H + unit.h;
    return part * s.splits + walk.split;
  };
  // 16 rows x kRankStep ranks from `first` on
  auto store = [&](const SummedGradient& g, int part, const float (&o)[2][4], int first, int L, int rank) {
    const int64_t base = unit.b * g.grad.stride[0] + unit.h * g.grad.stride[1];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = first + lane.row + 8 * (e >> 1), d = rank + n * 8 + lane.column + (e & 1);
        if (r < L && d < f.rank) store_gradient(g, part, base + r * f.rank + d, o[n][e]);
      }
  };
  __syncthreads();
  if (const SummedGradient& g = sums[kOffset]; g.grad.data) {
    const int part = part_of(g.grad) * s.row_blocks + walk.row_block;
    for (int j = threads.id; j < Lk; j += threads.count) {
      float sum = 0.f;
      for (int r = 0; r < rows; ++r) sum += tile[r * l.tile_pitch + j];
      store_gradient(g, part, unit.b * g.grad.stride[0] + unit.h * g.grad.stride[1] + j * g.grad.stride[3], sum);
    }
  }
#pragma unroll 1
  for (int rank = 0; rank < f.rank; rank += kRankStep) {
    if (const SummedGradient& g = sums[kRowsOrDense]; g.grad.data) {
      float o[2][4];
      clear(o);
#pragma unroll 1
      for (int j = 0; j < Lk; j += kChunk) {
        __syncthreads();
        stage_factor(stage, f.columns, unit.b, unit.h, j, kChunk, Lk, rank, f.rank, threads);
        __syncthreads();
        Products<float>::multiply(o, tile + warp_row * l.tile_pitch + j, l.tile_pitch, stage, kFactorPitch, kChunk,
                                  kRankStep, lane);
      }
      store(g, part_of(g.grad), o, walk.first_row + warp_row, Lq, rank);
    }
    if (const SummedGradient& g = sums[kColumns]; g.grad.data) {
      const int part = part_of(g.grad) * s.row_blocks + walk.row_block;
      __syncthreads();
      stage_factor(stage, f.rows, unit.b, unit.h, walk.first_row, rows, Lq, rank, f.rank, threads);
      __syncthreads();
#pragma unroll 1
      for (int j = warp_row; j < Lk; j += rows) {
        float o[2][4];
        clear(o);
        Products<float>::multiply_transposed(o, tile + j, l.tile_pitch, stage, kFactorPitch, rows, kRankStep, lane);
        store(g, part, o, j, Lk, rank);
      }
    }
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
  __device__ __forceinline__ void finish(unsigned char* memory, const RowWalk& now, const Threads& threads) const {
    if (multiplier) finish(multiplier, c.p.multiplier_factors, c.multiplier, memory, now, threads);
    if (bias) finish(bias, c.p.bias_factors, c.bias, memory, now, threads);
  }

 private:
  __device__ __forceinline__ void finish(float* tile, const Factors& f, const SummedGradient (&sums)[kFactors],
                                         unsigned char* memory, const RowWalk& now, const Threads& threads) const {
    const Layout& l = c.rows;
    if (f.rank > 0) fold_mask_gradient(tile, f, sums, now, l, at<float>(memory, l.factors), threads);
    else finish_mask_gradient(tile, sums[kRowsOrDense], now, l.tile_pitch, threads);
  }
};

__device__ __forceinline__ void add_parts(const SummedGradient& g, int block, const Threads& threads) {
  const int64_t index = static_cast<int64_t>(block) * threads.count + threads.id;
  if (index >= g.elements) return;
  float sum = 0.f;
  for (int part = 0; part < g.parts; ++part) sum += g.partial[part * g.elements + index];
  SummedGradient whole{g.grad, 1};
  store_gradient(whole, 0, index, sum);
}

inline int reduction_blocks(const MaskedAttentionCall& c) {
  int blocks = 0;
  for (int k = 0; k < kFactors; ++k) blocks += c.multiplier[k].reduction_blocks + c.bias[k].reduction_blocks;
  return blocks;
}
// The blocks of the second launch behind those that own keys: whether this is one, and then its work is done.
__device__ __forceinline__ bool is_reduction(const MaskedAttentionCall& c, const Threads& threads) {
  int block = static_cast<int>(blockIdx.x) - c.key_slices.blocks;
  if (block < 0) return false;
  for (int k = 0; k < 2 * kFactors; ++k) {
    const SummedGradient& g = k < kFactors ? c.multiplier[k] : c.bias[k - kFactors];
    if (block >= 0 && block < g.reduction_blocks) add_parts(g, block, threads);
    block -= g.reduction_blocks;
  }
  return true;
}

}  // namespace
}  // namespace cuda
}  // namespace lam
