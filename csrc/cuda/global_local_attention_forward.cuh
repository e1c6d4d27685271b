// Forward of global_local_attention: one launch. The walk of masked_attention through all chunks of keys; the scores of
// a tile are formed once and go through two running softmaxes, the local one only where the pattern leaves a pair.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"

namespace lam {
namespace cuda {
namespace {

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) two_map_forward_kernel(GRID_CONSTANT(MaskedAttentionCall, c)) {
  // of 8 keys at once: registers that two results leave
  constexpr int kKeyTiles = Width == 128 ? 4 : 8;
  DYNAMIC_SHARED_MEMORY(memory);
  const MaskedAttentionParams& p = c.p;
  const Layout& l = c.rows;
  const Threads threads;
  const Lane lane(threads.id);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const float scale = static_cast<float>(p.scale);
  const int warp_row = 16 * threads.warp, row = warp_row + lane.row;
  float* weights = l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_row * (kChunk + 4);

  RowWalk now(c, c.group[0].slices, static_cast<int>(blockIdx.x), 16 * l.warps);
  Ring<T, RowWalk> ring(l, memory, threads, now);
  RowMasks masks(c, memory);
  RunningSoftmax<Width / 8> whole, near;

  for (int step = 0; !now.done(); ++step, now.advance()) {
    ring.begin(step, now);
    if (now.is_first()) {
      masks.load(now, threads);
      whole.reset();
      near.reset();
    }
#pragma unroll 1
    for (int first = 0; first < kChunk; first += 8 * kKeyTiles) {
      const int column = now.chunk * kChunk + first + lane.column, word = 2 * now.chunk + first / 32;
      uint32_t seen[2][kKeyTiles / 4], local[2][kKeyTiles / 4];
      masks.bits_of(nullptr, masks.key_visible, row, word, lane.column, seen);
      if (!any_bit(seen)) continue;
      masks.bits_of(masks.visible, masks.key_visible, row, word, lane.column, local);
      const T* value = ring.chunk(l.value, l.value_pitch, step) + first * l.value_pitch;
      float s[kKeyTiles][4];
      clear(s);
      Products<T>::scores(s, ring.rows(l.query, l.row_pitch, now.member) + warp_row * l.row_pitch, l.row_pitch,
                          ring.chunk(l.key, l.row_pitch, step) + first * l.row_pitch, l.row_pitch, D, lane);
      fuse_scores(s, seen, masks, row, column, scale);
      if (any_bit(local)) {
        float of_pattern[kKeyTiles][4];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) of_pattern[n][e] = bit_of(local, n, e) ? s[n][e] : -kInfinity;
        near.weigh(of_pattern);
        Products<T>::accumulate(near.o, of_pattern, value, l.value_pitch, Dv, weights, lane);
      }
      whole.weigh(s);
      Products<T>::accumulate(whole.o, s, value, l.value_pitch, Dv, weights, lane);
    }
    if (now.is_last()) {
      whole.template store<T>(p.out, p.lse, now, warp_row, 1.f, lane);
      near.template store<T>(c.near.out, c.near.lse, now, warp_row, 1.f, lane);
    }
  }
}

}  // namespace

template <class T, int Width>
const char* launch_two_map_forward(const MaskedAttentionCall& c, void* stream) {
  return launch(two_map_forward_kernel<T, Width>, c.group[0].slices.blocks, 32 * c.rows.warps, c.rows.bytes, c,
                stream);
}

}  // namespace cuda
}  // namespace lam
