// Backward of masked_attention: at most two launches, no atomics, every sum in a fixed order.
// The first: a block owns rows and a slice of the (batch, head) pairs that share a mask gradient; it sums dQ in
// registers and the mask's gradient in shared memory over its slice, and leaves delta for the second.
// The second: a block owns keys and sums dK and dV over the heads that share them; further blocks add up the slices'
// parts of the mask gradients. Formulas: python_ref/masked_attention.py (delta: arXiv 2205.14135, appendix B).
#pragma once
#include "cuda/key_blocks.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_blocks.cuh"

namespace lam {
namespace cuda {
namespace {

// rowsum(dO * O) of the rows `row` and `row` + 8 of the warp.
template <class T>
__device__ __forceinline__ float delta_of(const T* grad_out, const View& out, const RowWalk& now, int row, int Lq,
                                          int Dv, const Lane& lane) {
  constexpr int kElements = 16 / sizeof(T);
  float sum = 0.f;
  const int i = now.first_row + row;
  if (i < Lq) {
    const T* o = static_cast<const T*>(out.data) + now.b * out.stride[0] + now.h * out.stride[1] + i * out.stride[2];
    const bool whole = Dv % kElements == 0 && (reinterpret_cast<uintptr_t>(o) & 15) == 0;
    for (int d = lane.id % 4 * kElements; d < Dv; d += 4 * kElements) {
      T x[kElements];
      if (whole) {
        const uint4 loaded = *reinterpret_cast<const uint4*>(o + d);
        memcpy(static_cast<void*>(x), &loaded, 16);
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (!whole) x[e] = d + e < Dv ? o[d + e] : from_float<T>(0.f);
        sum = fmaf(to_float(grad_out[d + e]), to_float(x[e]), sum);
      }
    }
  }
  return sum_of_row(sum);
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

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) row_gradient_kernel(GRID_CONSTANT(MaskedAttentionCall, c)) {
  DYNAMIC_SHARED_MEMORY(memory);
  const MaskedAttentionParams& p = c.p;
  const Layout& l = c.rows;
  const int first_group = c.group[0].slices.blocks, block = static_cast<int>(blockIdx.x);
  const RowGroup& group = c.group[block < first_group ? 0 : 1];
  const Threads threads;
  const Lane lane(threads.id);
  const int Lq = static_cast<int>(p.Lq), D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const float scale = static_cast<float>(p.scale), kept_scale = static_cast<float>(1 / (1 - p.dropout_p));
  const int warp_row = 16 * threads.warp, row = warp_row + lane.row;
  float* weights = l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_row * (kChunk + 4);
  float* grad_multiplier = group.grad_multiplier ? at<float>(memory, l.grad_multiplier) : nullptr;
  float* grad_bias = group.grad_bias ? at<float>(memory, l.grad_bias) : nullptr;

  RowWalk now(c, group.slices, block < first_group ? block : block - first_group, 16 * l.warps);
  Ring<T, RowWalk> ring(l, memory, threads, now);
  RowMasks masks(c, memory);
  for (int k = threads.id; k < 16 * l.warps * l.tile_pitch; k += threads.count) {
    if (grad_multiplier) grad_multiplier[k] = 0.f;
    if (grad_bias) grad_bias[k] = 0.f;
  }
  float dq[Width / 8][4], lse[2], shift[2];

  for (int step = 0; !now.done(); ++step, now.advance()) {
    ring.begin(step, now);
    const T* query = ring.rows(l.query, l.row_pitch, now.member) + warp_row * l.row_pitch;
    const T* grad_out = ring.rows(l.grad_out, l.value_pitch, now.member) + warp_row * l.value_pitch;
    if (now.is_first()) {
      masks.load(now, threads);
      clear(dq);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = now.first_row + row + 8 * half;
        const int64_t at_row = (now.b * p.H + now.h) * p.Lq + i;
        lse[half] = kInfinity;  // a row that sees no key: every weight 0
        shift[half] = delta_of(grad_out + (lane.row + 8 * half) * l.value_pitch, p.out, now, row + 8 * half, Lq, Dv, lane);
        if (i >= Lq) continue;
        const float value = static_cast<const float*>(
            p.lse.data)[now.b * p.lse.stride[0] + now.h * p.lse.stride[1] + i * p.lse.stride[2]];
        if (value != -kInfinity) lse[half] = value;
        if (p.grad_lse.data)
          shift[half] -= static_cast<const float*>(p.grad_lse.data)[now.b * p.grad_lse.stride[0] +
                                                                    now.h * p.grad_lse.stride[1] +
                                                                    i * p.grad_lse.stride[2]];
        if (group.writes_shift && lane.id % 4 == 0) c.shift[at_row] = shift[half];
      }
    }
    uint32_t seen[2][2], kept[2][2];
    masks.bits_of(masks.visible, masks.key_visible, row, now.chunk, lane.column, seen);
    if (masks.kept) masks.bits_of(masks.kept, nullptr, row, now.chunk, lane.column, kept);
    if (group.needs_keys && __any_sync(~0u, (seen[0][0] | seen[0][1] | seen[1][0] | seen[1][1]) != 0)) {
      const T* key = ring.chunk(l.key, l.row_pitch, step);
      float s[kTiles][4], dp[kTiles][4];
      clear(s);
      clear(dp);
      Products<T>::scores(s, query, l.row_pitch, key, l.row_pitch, D, lane);
      Products<T>::scores(dp, grad_out, l.value_pitch, ring.chunk(l.value, l.value_pitch, step), l.value_pitch, Dv,
                          lane);
      const int column = now.chunk * kChunk + lane.column;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float2 m[2] = {{1.f, 1.f}, {1.f, 1.f}}, a[2] = {{0.f, 0.f}, {0.f, 0.f}};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (masks.multiplier.data) m[half] = masks.multiplier.pair(row + 8 * half, column + n * 8);
          if (masks.bias.data) a[half] = masks.bias.pair(row + 8 * half, column + n * 8);
        }
        float gm[4], gb[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int half = e >> 1;
          const float factor = e & 1 ? m[half].y : m[half].x, add = e & 1 ? a[half].y : a[half].x;
          const bool allowed = bit_of(seen, n, e), visible = allowed && add != -kInfinity;
          const float x = s[n][e] * scale;
          float gradient = dp[n][e];
          if (masks.kept) gradient = bit_of(kept, n, e) ? gradient * kept_scale : 0.f;
          gradient -= shift[half];
          const float dz = visible ? exp_of_difference(fmaf(x, factor, add), lse[half]) * gradient : 0.f;
          gm[e] = dz * x;
          gb[e] = p.gate ? (allowed ? exp_of_difference(x * factor, lse[half]) * gradient : 0.f) : dz;
          s[n][e] = visible ? dz * factor : 0.f;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int to = (row + 8 * half) * l.tile_pitch + column + n * 8;
          if (grad_multiplier) {
            float2* sum = reinterpret_cast<float2*>(grad_multiplier + to);
            const float2 old = ptx::shared_load(sum);
            ptx::shared_store(sum, make_float2(old.x + gm[2 * half], old.y + gm[2 * half + 1]));
          }
          if (grad_bias) {
            float2* sum = reinterpret_cast<float2*>(grad_bias + to);
            const float2 old = ptx::shared_load(sum);
            ptx::shared_store(sum, make_float2(old.x + gb[2 * half], old.y + gb[2 * half + 1]));
          }
        }
      }
      if (group.grad_query) Products<T>::accumulate(dq, s, key, l.row_pitch, D, weights, lane);
    }
    if (now.is_last() && group.grad_query)
      store_rows(dq, scale, scale,
                 static_cast<T*>(p.grad_query.data) + now.b * p.grad_query.stride[0] + now.h * p.grad_query.stride[1],
                 p.grad_query.stride[2], now.first_row + warp_row, Lq, D, lane);
  }
  if (grad_multiplier)
    finish_mask_gradient(grad_multiplier, p.grad_multiplier, c.multiplier, now, l.tile_pitch, threads);
  if (grad_bias) finish_mask_gradient(grad_bias, p.grad_bias, c.bias, now, l.tile_pitch, threads);
}

__device__ __forceinline__ void add_parts(const View& grad, MaskGradient g, int block, const Threads& threads) {
  const int64_t index = static_cast<int64_t>(block) * threads.count + threads.id;
  if (index >= g.elements) return;
  float sum = 0.f;
  for (int part = 0; part < g.parts; ++part) sum += g.partial[part * g.elements + index];
  g.parts = 1;
  store_gradient(grad, g, 0, index, sum);
}

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) key_gradient_kernel(GRID_CONSTANT(MaskedAttentionCall, c)) {
  // of 8 queries at once: registers that dK and dV leave
  constexpr int kQueryTiles = Width == 128 ? 2 : 4;
  DYNAMIC_SHARED_MEMORY(memory);
  const MaskedAttentionParams& p = c.p;
  const Layout& l = c.keys;
  const Threads threads;
  const Lane lane(threads.id);
  const int key_blocks = c.key_slices.blocks, block = static_cast<int>(blockIdx.x) - key_blocks;
  if (block >= 0) {
    if (block < c.reduction_blocks[0]) add_parts(p.grad_multiplier, c.multiplier, block, threads);
    else add_parts(p.grad_bias, c.bias, block - c.reduction_blocks[0], threads);
    return;
  }
  const int Lk = static_cast<int>(p.Lk), D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const float scale = static_cast<float>(p.scale), kept_scale = static_cast<float>(1 / (1 - p.dropout_p));
  const int warp_key = 16 * threads.warp;
  float* weights = l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_key * (kChunk + 4);
  const bool wants_key = p.grad_key.data, wants_value = p.grad_value.data;

  KeyWalk now(c, static_cast<int>(blockIdx.x), 16 * l.warps);
  Ring<T, KeyWalk> ring(l, memory, threads, now);
  KeyMasks masks(c, memory);
  float dk[Width / 8][4], dv[Width / 8][4];

  for (int step = 0; !now.done(); ++step) {
    ring.begin(step, now);
    masks.load(now, threads);
    if (now.is_first()) {
      clear(dk);
      clear(dv);
    }
#pragma unroll 1
    for (int first = 0; first < kChunk; first += 8 * kQueryTiles) {
      const uint32_t seen = masks.pairs_of<kQueryTiles>(masks.visible, masks.key_visible, first, warp_key, lane);
      if (!__any_sync(~0u, seen != 0)) continue;
      const uint32_t kept = masks.kept ? masks.pairs_of<kQueryTiles>(masks.kept, nullptr, first, warp_key, lane) : ~0u;
      const T* key = ring.rows(l.key, l.row_pitch, now.member) + warp_key * l.row_pitch;
      const T* query = ring.chunk(l.query, l.row_pitch, step) + first * l.row_pitch;
      const T* grad_out = ring.chunk(l.grad_out, l.value_pitch, step) + first * l.value_pitch;
      float s[kQueryTiles][4];
      clear(s);
      Products<T>::scores(s, key, l.row_pitch, query, l.row_pitch, D, lane);
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = first + n * 8 + lane.column + (e & 1), j = warp_key + lane.row + 8 * (e >> 1);
          const float add = masks.bias.data ? masks.bias.one(i, j) : 0.f;
          const float factor = masks.multiplier.data ? masks.multiplier.one(i, j) : 1.f, lse = masks.lse_of(i);
          const bool visible = (seen >> (4 * n + e) & 1) && add != -kInfinity;
          s[n][e] = visible ? exp_of_difference(fmaf(s[n][e] * scale, factor, add), lse) : 0.f;
        }
      if (wants_value) {
        float dropped[kQueryTiles][4];
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) dropped[n][e] = kept >> (4 * n + e) & 1 ? s[n][e] * kept_scale : 0.f;
        Products<T>::accumulate(dv, dropped, grad_out, l.value_pitch, Dv, weights, lane);
      }
      if (wants_key) {
        const T* value = ring.rows(l.value, l.value_pitch, now.member) + warp_key * l.value_pitch;
        float dp[kQueryTiles][4];
        clear(dp);
        Products<T>::scores(dp, value, l.value_pitch, grad_out, l.value_pitch, Dv, lane);
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = first + n * 8 + lane.column + (e & 1), j = warp_key + lane.row + 8 * (e >> 1);
            const float factor = masks.multiplier.data ? masks.multiplier.one(i, j) : 1.f;
            const float gradient = (kept >> (4 * n + e) & 1 ? dp[n][e] * kept_scale : 0.f) - masks.shift_of(i);
            if (s[n][e] != 0.f) s[n][e] *= gradient * factor;  // hidden: 0, whatever the rest is
          }
        Products<T>::accumulate(dk, s, query, l.row_pitch, D, weights, lane);
      }
    }
    const int b = now.b, head = now.key_head, member = now.member;
    now.advance();
    if (now.member == member) continue;
    if (wants_key)
      store_rows(dk, scale, scale,
                 static_cast<T*>(p.grad_key.data) + b * p.grad_key.stride[0] + head * p.grad_key.stride[1],
                 p.grad_key.stride[2], now.first_key + warp_key, Lk, D, lane);
    if (wants_value)
      store_rows(dv, 1.f, 1.f,
                 static_cast<T*>(p.grad_value.data) + b * p.grad_value.stride[0] + head * p.grad_value.stride[1],
                 p.grad_value.stride[2], now.first_key + warp_key, Lk, Dv, lane);
  }
}

}  // namespace

template <class T, int Width>
const char* launch_backward(const MaskedAttentionCall& c, void* stream) {
  const int row_blocks = c.group[0].slices.blocks + c.group[1].slices.blocks;
  const int key_blocks = c.key_slices.blocks + c.reduction_blocks[0] + c.reduction_blocks[1];
  const char* error =
      launch(row_gradient_kernel<T, Width>, row_blocks, 32 * c.rows.warps, c.rows.bytes, c, stream);
  if (error) return error;
  return launch(key_gradient_kernel<T, Width>, key_blocks, 32 * c.keys.warps, c.keys.bytes, c, stream);
}

}  // namespace cuda
}  // namespace lam
