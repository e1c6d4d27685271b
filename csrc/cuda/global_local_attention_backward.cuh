// Backward of global_local_attention: the two launches of masked_attention with two maps of one tile of scores. Their
// gradients dZ are added before the masks and the products with query and key see them: 4 products in the first launch
// (scores, dP of both maps, dQ), 6 in the second (scores, dP and dV of both, dK), those of the local map only where the
// pattern leaves a pair. Formulas: python_ref/global_local_attention.py.
#pragma once
#include "cuda/key_blocks.cuh"
#include "cuda/launch.cuh"
#include "cuda/mask_gradients.cuh"
#include "cuda/softmax.cuh"

namespace lam {
namespace cuda {
namespace {

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) two_map_row_kernel(GRID_CONSTANT(MaskedAttentionCall, c)) {
  // of 8 keys at once: registers that dQ leaves
  constexpr int kKeyTiles = 4;
  DYNAMIC_SHARED_MEMORY(memory);
  const MaskedAttentionParams& p = c.p;
  const Layout& l = c.rows;
  const Threads threads;
  const Lane lane(threads.id);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const float scale = static_cast<float>(p.scale);
  const int warp_row = 16 * threads.warp, row = warp_row + lane.row;
  float* weights = l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_row * (kChunk + 4);

  const RowGradients gradients(c, static_cast<int>(blockIdx.x), memory, threads);
  const RowGroup& group = gradients.group;
  RowWalk now(c, group.slices, gradients.block, 16 * l.warps);
  Ring<T, RowWalk> ring(l, memory, threads, now);
  RowMasks masks(c, memory);
  float dq[Width / 8][4];
  RowStatistics whole[2], near[2];

  for (int step = 0; !now.done(); ++step, now.advance()) {
    ring.begin(step, now);
    const T* query = ring.rows(l.query, l.row_pitch, now.member) + warp_row * l.row_pitch;
    const T* grad_whole = ring.rows(l.grad_out, l.value_pitch, now.member) + warp_row * l.value_pitch;
    const T* grad_near = ring.rows(l.near_grad_out, l.value_pitch, now.member) + warp_row * l.value_pitch;
    if (now.is_first()) {
      masks.load(now, threads);
      clear(dq);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int to = (lane.row + 8 * half) * l.value_pitch;
        whole[half].load(grad_whole + to, p.out, p.lse, {}, group.writes_shift ? c.shift : nullptr, now,
                         row + 8 * half, lane);
        near[half].load(grad_near + to, c.near.out, c.near.lse, {}, group.writes_shift ? c.near.shift : nullptr, now,
                        row + 8 * half, lane);
      }
    }
#pragma unroll 1
    for (int first = 0; group.needs_keys && first < kChunk; first += 8 * kKeyTiles) {
      const int column = now.chunk * kChunk + first + lane.column, word = 2 * now.chunk + first / 32;
      uint32_t seen[2][1], local[2][1];
      masks.bits_of(nullptr, masks.key_visible, row, word, lane.column, seen);
      if (!any_bit(seen)) continue;
      masks.bits_of(masks.visible, masks.key_visible, row, word, lane.column, local);
      const T* key = ring.chunk(l.key, l.row_pitch, step) + first * l.row_pitch;
      const T* value = ring.chunk(l.value, l.value_pitch, step) + first * l.value_pitch;
      float s[kKeyTiles][4], dp[kKeyTiles][4], dp_near[kKeyTiles][4];
      clear(s);
      clear(dp);
      clear(dp_near);
      Products<T>::scores(s, query, l.row_pitch, key, l.row_pitch, D, lane);
      Products<T>::scores(dp, grad_whole, l.value_pitch, value, l.value_pitch, Dv, lane);
      if (any_bit(local)) Products<T>::scores(dp_near, grad_near, l.value_pitch, value, l.value_pitch, Dv, lane);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const MaskPairs mask(masks, row, column + n * 8);
        float gm[4], gb[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int half = e >> 1;
          const float factor = mask.factor_of(e), add = mask.add_of(e), x = s[n][e] * scale;
          const bool visible = bit_of(seen, n, e) && add != -kInfinity;
          const float z = fmaf(x, factor, add);
          float dz = 0.f;
          if (visible) dz = exp_of_difference(z, whole[half].lse) * (dp[n][e] - whole[half].shift);
          if (visible && bit_of(local, n, e))
            dz += exp_of_difference(z, near[half].lse) * (dp_near[n][e] - near[half].shift);
          gm[e] = dz * x;
          gb[e] = dz;
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

// Weights of one map, keys x queries from `first` on, become the gradients dZ.
template <class T, int N>
__device__ __forceinline__ void weights_to_slopes(float (&weights)[N][4], const T* value, const T* grad_out,
                                                  const QueryStatistics& rows, int first, int pitch, int Dv,
                                                  const Lane& lane) {
  float dp[N][4];
  clear(dp);
  Products<T>::scores(dp, value, pitch, grad_out, pitch, Dv, lane);
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float shift = rows.shift_of(first + n * 8 + lane.column + (e & 1));
      if (weights[n][e] != 0.f) weights[n][e] *= dp[n][e] - shift;
    }
}

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) two_map_key_kernel(GRID_CONSTANT(MaskedAttentionCall, c)) {
  // of 8 queries at once: registers that dK and dV leave
  constexpr int kQueryTiles = Width == 128 ? 2 : 4;
  DYNAMIC_SHARED_MEMORY(memory);
  const MaskedAttentionParams& p = c.p;
  const Layout& l = c.keys;
  const Threads threads;
  const Lane lane(threads.id);
  if (is_reduction(c, threads)) return;
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const float scale = static_cast<float>(p.scale);
  const int warp_key = 16 * threads.warp;
  float* weights = l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_key * (kChunk + 4);
  const bool wants_key = p.grad_key.data, wants_value = p.grad_value.data;

  KeyWalk<2> now(c, static_cast<int>(blockIdx.x));
  Ring<T, KeyWalk<2>> ring(l, memory, threads, now);
  KeyMasks<2> masks(c, memory);
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
      const uint32_t seen = masks.pairs_of<kQueryTiles>(nullptr, masks.key_visible, first, warp_key, lane);
      if (!__any_sync(~0u, seen != 0)) continue;
      const uint32_t local = masks.pairs_of<kQueryTiles>(masks.visible, masks.key_visible, first, warp_key, lane);
      const bool any_local = __any_sync(~0u, local != 0);
      const T* key = ring.rows(l.key, l.row_pitch, now.member) + warp_key * l.row_pitch;
      const T* value = ring.rows(l.value, l.value_pitch, now.member) + warp_key * l.value_pitch;
      const T* query = ring.chunk(l.query, l.row_pitch, step) + first * l.row_pitch;
      const T* grad_whole = ring.chunk(l.grad_out, l.value_pitch, step) + first * l.value_pitch;
      const T* grad_near = ring.chunk(l.near_grad_out, l.value_pitch, step) + first * l.value_pitch;
      float whole[kQueryTiles][4], near[kQueryTiles][4];
      clear(whole);
      Products<T>::scores(whole, key, l.row_pitch, query, l.row_pitch, D, lane);
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = first + n * 8 + lane.column + (e & 1), j = warp_key + lane.row + 8 * (e >> 1);
          const float add = masks.bias.data ? masks.bias.one(i, j) : 0.f;
          const float factor = masks.multiplier.data ? masks.multiplier.one(i, j) : 1.f;
          const bool visible = (seen >> (4 * n + e) & 1) && add != -kInfinity;
          const float z = fmaf(whole[n][e] * scale, factor, add), lse = masks.rows.lse_of(i);
          whole[n][e] = visible ? exp_of_difference(z, lse) : 0.f;
          near[n][e] = 0.f;
          if (any_local) {
            const float near_lse = masks.near_rows.lse_of(i);
            if (visible && (local >> (4 * n + e) & 1)) near[n][e] = exp_of_difference(z, near_lse);
          }
        }
      if (wants_value) {
        Products<T>::accumulate(dv, whole, grad_whole, l.value_pitch, Dv, weights, lane);
        if (any_local) Products<T>::accumulate(dv, near, grad_near, l.value_pitch, Dv, weights, lane);
      }
      if (wants_key) {
        weights_to_slopes(whole, value, grad_whole, masks.rows, first, l.value_pitch, Dv, lane);
        if (any_local) weights_to_slopes(near, value, grad_near, masks.near_rows, first, l.value_pitch, Dv, lane);
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = first + n * 8 + lane.column + (e & 1), j = warp_key + lane.row + 8 * (e >> 1);
            const float factor = masks.multiplier.data ? masks.multiplier.one(i, j) : 1.f;
            whole[n][e] += near[n][e];
            if (whole[n][e] != 0.f) whole[n][e] *= factor;  // hidden: 0, whatever the factor is
          }
        Products<T>::accumulate(dk, whole, query, l.row_pitch, D, weights, lane);
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
const char* launch_two_map_backward(const MaskedAttentionCall& c, void* stream) {
  const int row_blocks = c.group[0].slices.blocks + c.group[1].slices.blocks;
  const int key_blocks = c.key_slices.blocks + reduction_blocks(c);
  const char* error = launch(two_map_row_kernel<T, Width>, row_blocks, 32 * c.rows.warps, c.rows.bytes, c, stream);
  if (error) return error;
  return launch(two_map_key_kernel<T, Width>, key_blocks, 32 * c.keys.warps, c.keys.bytes, c, stream);
}

}  // namespace cuda
}  // namespace lam
