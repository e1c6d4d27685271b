// Forward of masked_attention: one launch. A block goes through the chunks of 64 keys of each of its (batch, head)
// pairs with the running maximum and sum of each row; up to 64 keys that is the whole row at once. The mask tile stays
// in shared memory while the pairs share it.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"

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
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const float scale = static_cast<float>(p.scale), kept_scale = static_cast<float>(1 / (1 - p.dropout_p));
  const int warp_row = 16 * threads.warp, row = warp_row + lane.row;
  float* weights = l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_row * (kChunk + 4);

  RowWalk now(c, c.group[0].slices, static_cast<int>(blockIdx.x), 16 * l.warps);
  Ring<T, RowWalk> ring(l, memory, threads, now);
  RowMasks masks(c, memory);
  RunningSoftmax<Width / 8> softmax;

  for (int step = 0; !now.done(); ++step, now.advance()) {
    ring.begin(step, now);
    if (now.is_first()) {
      masks.load(now, threads);
      softmax.reset();
    }
    uint32_t seen[2][2];
    masks.bits_of(masks.visible, masks.key_visible, row, 2 * now.chunk, lane.column, seen);
    if (any_bit(seen)) {
      float s[kTiles][4];
      clear(s);
      Products<T>::scores(s, ring.rows(l.query, l.row_pitch, now.member) + warp_row * l.row_pitch, l.row_pitch,
                          ring.chunk(l.key, l.row_pitch, step), l.row_pitch, D, lane);
      fuse_scores(s, seen, masks, row, now.chunk * kChunk + lane.column, scale);
      softmax.weigh(s);
      if (masks.kept) {
        uint32_t kept[2][2];
        masks.bits_of(masks.kept, nullptr, row, 2 * now.chunk, lane.column, kept);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] = bit_of(kept, n, e) ? s[n][e] : 0.f;
      }
      Products<T>::accumulate(softmax.o, s, ring.chunk(l.value, l.value_pitch, step), l.value_pitch, Dv, weights,
                              lane);
    }
    if (now.is_last()) softmax.template store<T>(p.out, p.lse, now, warp_row, kept_scale, lane);
  }
}

}  // namespace

template <class T, int Width>
const char* launch_forward(const MaskedAttentionCall& c, void* stream) {
  return launch(forward_kernel<T, Width>, c.group[0].slices.blocks, 32 * c.rows.warps, c.rows.bytes, c, stream);
}

}  // namespace cuda
}  // namespace lam
