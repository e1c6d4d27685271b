// Forward of masked_attention: one launch. A block goes through the chunks of 64 keys of each of its (batch, head)
// pairs with the running maximum and sum of each row (online softmax, arXiv 1805.02867); up to 64 keys that is the
// whole row at once. The mask tile stays in shared memory while the pairs share it.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/row_blocks.cuh"

namespace lam {
namespace cuda {
namespace {

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) forward_kernel(GRID_CONSTANT(MaskedAttentionCall, c)) {
  DYNAMIC_SHARED_MEMORY(memory);
  const MaskedAttentionParams& p = c.p;
  const Layout& l = c.rows;
  const Threads threads;
  const Lane lane(threads.id);
  const int Lq = static_cast<int>(p.Lq), D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const float scale = static_cast<float>(p.scale), kept_scale = static_cast<float>(1 / (1 - p.dropout_p));
  const int warp_row = 16 * threads.warp, row = warp_row + lane.row;
  float* weights = l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_row * (kChunk + 4);

  RowWalk now(c, c.group[0].slices, static_cast<int>(blockIdx.x), 16 * l.warps);
  Ring<T, RowWalk> ring(l, memory, threads, now);
  RowMasks masks(c, memory);
  float o[Width / 8][4], largest[2], sum[2];

  for (int step = 0; !now.done(); ++step, now.advance()) {
    ring.begin(step, now);
    if (now.is_first()) {
      masks.load(now, threads);
      clear(o);
      largest[0] = largest[1] = -kInfinity, sum[0] = sum[1] = 0.f;
    }
    uint32_t seen[2][2];
    masks.bits_of(masks.visible, masks.key_visible, row, now.chunk, lane.column, seen);
    if (__any_sync(~0u, (seen[0][0] | seen[0][1] | seen[1][0] | seen[1][1]) != 0)) {
      float s[kTiles][4];
      clear(s);
      Products<T>::scores(s, ring.rows(l.query, l.row_pitch, now.member) + warp_row * l.row_pitch, l.row_pitch,
                          ring.chunk(l.key, l.row_pitch, step), l.row_pitch, D, lane);
      const int column = now.chunk * kChunk + lane.column;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float2 m[2] = {{1.f, 1.f}, {1.f, 1.f}}, a[2] = {{0.f, 0.f}, {0.f, 0.f}};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (masks.multiplier.data) m[half] = masks.multiplier.pair(row + 8 * half, column + n * 8);
          if (masks.bias.data) a[half] = masks.bias.pair(row + 8 * half, column + n * 8);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float factor = e & 1 ? m[e >> 1].y : m[e >> 1].x, shift = e & 1 ? a[e >> 1].y : a[e >> 1].x;
          const bool visible = bit_of(seen, n, e) && shift != -kInfinity;
          s[n][e] = visible ? fmaf(s[n][e] * scale, factor, shift) : -kInfinity;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = largest[half];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        most = max_of_row(most);
        const float reference = most == -kInfinity ? 0.f : most;  // a row that has seen nothing yet
        const float shrink = exp_of_difference(largest[half], reference);
        largest[half] = most;
        sum[half] *= shrink;
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) o[n][2 * half] *= shrink, o[n][2 * half + 1] *= shrink;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[n][e] = exp_of_difference(s[n][e], reference);
            sum[half] += s[n][e];
          }
      }
      if (masks.kept) {
        uint32_t kept[2][2];
        masks.bits_of(masks.kept, nullptr, row, now.chunk, lane.column, kept);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] = bit_of(kept, n, e) ? s[n][e] : 0.f;
      }
      Products<T>::accumulate(o, s, ring.chunk(l.value, l.value_pitch, step), l.value_pitch, Dv, weights, lane);
    }
    if (now.is_last()) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = sum_of_row(sum[half]);
        const bool empty = largest[half] == -kInfinity && total == 0.f;
        factor[half] = empty ? 0.f : kept_scale / total;
        const int i = now.first_row + row + 8 * half;
        if (lane.id % 4 == 0 && i < Lq)
          static_cast<float*>(p.lse.data)[now.b * p.lse.stride[0] + now.h * p.lse.stride[1] + i * p.lse.stride[2]] =
              empty ? -kInfinity : largest[half] + logf(total);
      }
      T* out = static_cast<T*>(p.out.data) + now.b * p.out.stride[0] + now.h * p.out.stride[1];
      store_rows(o, factor[0], factor[1], out, p.out.stride[2], now.first_row + warp_row, Lq, Dv, lane);
    }
  }
}

}  // namespace

template <class T, int Width>
const char* launch_forward(const MaskedAttentionCall& c, void* stream) {
  return launch(forward_kernel<T, Width>, c.group[0].slices.blocks, 32 * c.rows.warps, c.rows.bytes, c, stream);
}

}  // namespace cuda
}  // namespace lam
