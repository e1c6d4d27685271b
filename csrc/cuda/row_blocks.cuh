// What the forward kernel and the first backward kernel share: a block owns some rows (queries) and goes through its
// (batch, head) pairs, and for each through the chunks of 64 keys that its rows can see.
#pragma once
#include "cuda/mask_tile.cuh"
#include "cuda/ring.cuh"

namespace lam {
namespace cuda {
namespace {

struct RowWalk {
  const MaskedAttentionCall& c;
  const Slices& slices;
  int unit, split, row_block, first_row, last_row;
  int first_member, member, end_member;
  int b, h, begin_chunk, chunk, end_chunk;

  // Blocks that share K and V of a pair come one after the other.
  __device__ __forceinline__ RowWalk(const MaskedAttentionCall& call, const Slices& s, int block, int rows)
      : c(call), slices(s) {
    row_block = block % s.row_blocks;
    split = block / s.row_blocks % s.splits;
    unit = block / s.row_blocks / s.splits;
    first_member = static_cast<int>(static_cast<int64_t>(s.members) * split / s.splits);
    end_member = static_cast<int>(static_cast<int64_t>(s.members) * (split + 1) / s.splits);
    member = first_member;
    first_row = row_block * rows;
    last_row = first_row + rows < c.p.Lq ? first_row + rows - 1 : static_cast<int>(c.p.Lq) - 1;
    enter();
  }
  __device__ __forceinline__ bool done() const { return member >= end_member; }
  __device__ __forceinline__ bool is_first() const { return chunk == begin_chunk; }
  __device__ __forceinline__ bool is_last() const { return chunk + 1 == end_chunk; }
  __device__ __forceinline__ void advance() {
    if (++chunk < end_chunk) return;
    ++member;
    enter();
  }
  __device__ __forceinline__ void enter() {
    if (done()) return;
    const int H = static_cast<int>(c.p.H), Lq = static_cast<int>(c.p.Lq), Lk = static_cast<int>(c.p.Lk);
    if (slices.share_b) b = slices.share_h ? member / H : member, h = slices.share_h ? member % H : unit;
    else b = slices.share_h ? unit : unit / H, h = slices.share_h ? member : unit % H;
    begin_chunk = 0, end_chunk = (Lk + kChunk - 1) / kChunk;
    if (const PatternSpec* spec = c.two_maps ? nullptr : spec_of(c, h)) {  // every bound of a pattern grows with the row
      const int start = static_cast<int>(row_range(*spec, first_row, Lq, Lk).start);
      const int stop = static_cast<int>(row_range(*spec, last_row, Lq, Lk).stop);
      if (start < stop) begin_chunk = start / kChunk, end_chunk = (stop + kChunk - 1) / kChunk;
      else end_chunk = 1;  // the pair's results are written all the same
    }
    chunk = begin_chunk;
  }
  template <class T>
  __device__ __forceinline__ void issue(const Ring<T, RowWalk>& ring) const {
    const MaskedAttentionParams& p = c.p;
    const Layout& l = c.rows;
    const int Lq = static_cast<int>(p.Lq), Lk = static_cast<int>(p.Lk), D = static_cast<int>(p.D);
    const int Dv = static_cast<int>(p.Dv), rows = 16 * l.warps, key_head = h / static_cast<int>(p.H / p.Hkv);
    if (is_first()) {
      copy_rows(ring.rows(l.query, l.row_pitch, member), l.row_pitch, p.query, c.query_aligned, b, h, first_row, rows,
                Lq, D, ring.threads);
      if (l.grad_out >= 0)
        copy_rows(ring.rows(l.grad_out, l.value_pitch, member), l.value_pitch, p.grad_out, c.grad_out_aligned, b, h,
                  first_row, rows, Lq, Dv, ring.threads);
      if (l.near_grad_out >= 0)
        copy_rows(ring.rows(l.near_grad_out, l.value_pitch, member), l.value_pitch, c.near.grad_out,
                  c.near.grad_out_aligned, b, h, first_row, rows, Lq, Dv, ring.threads);
    }
    copy_rows(ring.chunk(l.key, l.row_pitch, ring.issued), l.row_pitch, p.key, c.key_aligned, b, key_head,
              chunk * kChunk, kChunk, Lk, D, ring.threads);
    copy_rows(ring.chunk(l.value, l.value_pitch, ring.issued), l.value_pitch, p.value, c.value_aligned, b, key_head,
              chunk * kChunk, kChunk, Lk, Dv, ring.threads);
  }
};

// A lane's pairs of 32 N keys from word `first` on, rows `row` and `row` + 8: bit_of. No bits or no keys: all.
template <int N>
__device__ __forceinline__ void bits_of_rows(const uint32_t* bits, const uint32_t* keys, int words, int row, int first,
                                             int column, uint32_t (&out)[2][N]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const uint32_t word = bits ? bits[(row + 8 * half) * words + first + k] : ~0u;
      out[half][k] = (keys ? word & keys[first + k] : word) >> column;
    }
}

// Mask tiles and visibility bits of the block's rows and all keys, loaded when the pair that comes needs others.
struct RowMasks {
  const MaskedAttentionCall& c;
  MaskTile<true, true> multiplier, bias;
  uint32_t *visible, *kept, *key_visible;
  int words;
  int visible_of = -1, kept_of = -1, keys_of = -1;

  __device__ __forceinline__ RowMasks(const MaskedAttentionCall& call, unsigned char* memory)
      : c(call),
        multiplier(memory, call.rows, call.rows.multiplier, call.p.multiplier, call.p.multiplier_factors),
        bias(memory, call.rows, call.rows.bias, call.p.bias, call.p.bias_factors),
        visible(at<uint32_t>(memory, call.rows.visible)),
        kept(call.rows.kept < 0 ? nullptr : at<uint32_t>(memory, call.rows.kept)),
        key_visible(at<uint32_t>(memory, call.rows.key_visible)),
        words(2 * call.rows.chunks) {}

  __device__ __forceinline__ void load(const RowWalk& now, const Threads& threads) {
    const MaskedAttentionParams& p = c.p;
    const int rows = 16 * c.rows.warps, columns = c.rows.chunks * kChunk, i = now.first_row;
    const int H = static_cast<int>(p.H);
    bool loads = multiplier.bring(p, now.b, now.h, i, rows, 0, columns, false, threads);
    loads |= bias.bring(p, now.b, now.h, i, rows, 0, columns, p.gate, threads);
    const int visible_by = (c.visible_by_b ? now.b * H : 0) + (c.visible_by_h ? now.h : 0);
    if (visible_of != visible_by) {
      load_visible(visible, c, now.b, now.h, i, rows, 0, words, threads);
      visible_of = visible_by, loads = true;
    }
    const int keys_by = p.key_mask.data ? now.b : 0;
    if (keys_of != keys_by) {
      load_key_visible(key_visible, c, now.b, 0, words, threads);
      keys_of = keys_by, loads = true;
    }
    if (kept && kept_of != now.b * H + now.h) {
      load_kept(kept, c, now.b, now.h, i, rows, 0, words, threads);
      kept_of = now.b * H + now.h, loads = true;
    }
    if (loads) __syncthreads();
  }
  template <int N>
  __device__ __forceinline__ void bits_of(const uint32_t* bits, const uint32_t* keys, int row, int first, int column,
                                          uint32_t (&out)[2][N]) const {
    bits_of_rows(bits, keys, words, row, first, column, out);
  }
};

template <int N>
__device__ __forceinline__ bool bit_of(const uint32_t (&words)[2][N], int n, int e) {
  return words[e >> 1][n >> 2] >> (8 * (n & 3) + (e & 1)) & 1;
}
template <int N>
__device__ __forceinline__ bool any_bit(const uint32_t (&words)[2][N]) {  // of the warp
  uint32_t all = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) all |= words[0][k] | words[1][k];
  return __any_sync(~0u, all != 0);
}

// A warp's 16 rows of a contiguous result of one (batch, head) pair, times a factor a row.
template <class T, int N>
__device__ __forceinline__ void store_rows(const float (&o)[N][4], float top, float bottom, const View& to_all, int b,
                                           int h, int row, int64_t L, int width, const Lane& lane) {
  T* out = static_cast<T*>(to_all.data) + b * to_all.stride[0] + h * to_all.stride[1];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + lane.row + 8 * half;
    if (i >= L) continue;
    const float factor = half ? bottom : top;
    T* to = out + i * to_all.stride[2];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int column = n * 8 + lane.column;
      const T pair[2] = {from_float<T>(o[n][2 * half] * factor), from_float<T>(o[n][2 * half + 1] * factor)};
      if (width % 2 == 0) {
        struct alignas(2 * sizeof(T)) Pair {
          T x, y;
        };
        if (column < width) *reinterpret_cast<Pair*>(to + column) = Pair{pair[0], pair[1]};
      } else {
        if (column < width) to[column] = pair[0];
        if (column + 1 < width) to[column + 1] = pair[1];
      }
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lam
