// Backward of masked_attention: at most two launches, no atomics, every sum in a fixed order.
// The first: a block owns rows and a slice of the (batch, head) pairs that share a mask gradient; it sums dQ in
// registers and the mask's gradient in shared memory over its slice, and leaves delta for the second.
// The second: a block owns keys and sums dK and dV over the heads that share them; further blocks add up the slices'
// parts of the mask gradients. Formulas: python_ref/masked_attention.py (delta: arXiv 2205.14135, appendix B).
#pragma once
#include "cuda/key_blocks.cuh"
#include "cuda/launch.cuh"
#include "cuda/mask_gradients.cuh"
#include "cuda/softmax.cuh"

namespace lam {
namespace cuda {
namespace {

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) row_gradient_kernel(GRID_CONSTANT(MaskedAttentionCall, c)) {
  DYNAMIC_SHARED_MEMORY(memory);
  const MaskedAttentionParams& p = c.p;
  const Layout& l = c.rows;
  const Threads threads;
  const Lane lane(threads.id);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const float scale = static_cast<float>(p.scale), kept_scale = static_cast<float>(1 / (1 - p.dropout_p));
  const int warp_row = 16 * threads.warp, row = warp_row + lane.row;
  float* weights = l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_row * (kChunk + 4);

  const RowGradients gradients(c, static_cast<int>(blockIdx.x), memory, threads);
  const RowGroup& group = gradients.group;
  RowWalk now(c, group.slices, gradients.block, 16 * l.warps);
  Ring<T, RowWalk> ring(l, memory, threads, now);
  RowMasks masks(c, memory);
  float dq[Width / 8][4];
  RowStatistics rows[2];

  for (int step = 0; !now.done(); ++step, now.advance()) {
    ring.begin(step, now);
    const T* query = ring.rows(l.query, l.row_pitch, now.member) + warp_row * l.row_pitch;
    const T* grad_out = ring.rows(l.grad_out, l.value_pitch, now.member) + warp_row * l.value_pitch;
    if (now.is_first()) {
      masks.load(now, threads);
      clear(dq);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        rows[half].load(grad_out + (lane.row + 8 * half) * l.value_pitch, p.out, p.lse, p.grad_lse,
                        group.writes_shift ? c.shift : nullptr, now, row + 8 * half, lane);
    }
    uint32_t seen[2][2], kept[2][2];
    masks.bits_of(masks.visible, masks.key_visible, row, 2 * now.chunk, lane.column, seen);
    if (masks.kept) masks.bits_of(masks.kept, nullptr, row, 2 * now.chunk, lane.column, kept);
    if (group.needs_keys && any_bit(seen)) {
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
        const MaskPairs mask(masks, row, column + n * 8);
        float gm[4], gb[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const RowStatistics& of_row = rows[e >> 1];
          const float factor = mask.factor_of(e), add = mask.add_of(e);
          const bool allowed = bit_of(seen, n, e), visible = allowed && add != -kInfinity;
          const float x = s[n][e] * scale;
          float gradient = dp[n][e];
          if (masks.kept) gradient = bit_of(kept, n, e) ? gradient * kept_scale : 0.f;
          gradient -= of_row.shift;
          const float dz = visible ? exp_of_difference(fmaf(x, factor, add), of_row.lse) * gradient : 0.f;
          gm[e] = dz * x;
          gb[e] = p.gate ? (allowed ? exp_of_difference(x * factor, of_row.lse) * gradient : 0.f) : dz;
          s[n][e] = visible ? dz * factor : 0.f;
        }
        gradients.add(row, column + n * 8, gm, gb);
      }
      if (group.grad_query) Products<T>::accumulate(dq, s, key, l.row_pitch, D, weights, lane);
    }
    if (now.is_last() && group.grad_query)
      store_rows<T>(dq, scale, scale, p.grad_query, now.b, now.h, now.first_row + warp_row, p.Lq, D, lane);
  }
  gradients.finish(memory, now, threads);
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
  if (is_reduction(c, threads)) return;
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const float scale = static_cast<float>(p.scale), kept_scale = static_cast<float>(1 / (1 - p.dropout_p));
  const int warp_key = 16 * threads.warp;
  float* weights = l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_key * (kChunk + 4);
  const bool wants_key = p.grad_key.data, wants_value = p.grad_value.data;

  KeyWalk<1> now(c, static_cast<int>(blockIdx.x));
  Ring<T, KeyWalk<1>> ring(l, memory, threads, now);
  KeyMasks<1> masks(c, memory);
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
          const float factor = masks.multiplier.data ? masks.multiplier.one(i, j) : 1.f, lse = masks.rows.lse_of(i);
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
            const float gradient = (kept >> (4 * n + e) & 1 ? dp[n][e] * kept_scale : 0.f) - masks.rows.shift_of(i);
            if (s[n][e] != 0.f) s[n][e] *= gradient * factor;  // hidden: 0, whatever the rest is
          }
        Products<T>::accumulate(dk, s, query, l.row_pitch, D, weights, lane);
      }
    }
    const int b = now.b, head = now.key_head, member = now.member;
    now.advance();
    if (now.member == member) continue;
    if (wants_key) store_rows<T>(dk, scale, scale, p.grad_key, b, head, now.first_key + warp_key, p.Lk, D, lane);
    if (wants_value) store_rows<T>(dv, 1.f, 1.f, p.grad_value, b, head, now.first_key + warp_key, p.Lk, Dv, lane);
  }
}

}  // namespace

template <class T, int Width>
const char* launch_backward(const MaskedAttentionCall& c, void* stream) {
  const int row_blocks = c.group[0].slices.blocks + c.group[1].slices.blocks;
  const int key_blocks = c.key_slices.blocks + reduction_blocks(c);
  const char* error =
      launch(row_gradient_kernel<T, Width>, row_blocks, 32 * c.rows.warps, c.rows.bytes, c, stream);
  if (error) return error;
  return launch(key_gradient_kernel<T, Width>, key_blocks, 32 * c.keys.warps, c.keys.bytes, c, stream);
}

}  // namespace cuda
}  // namespace lam
