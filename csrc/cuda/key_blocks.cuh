// The second backward kernel's way: a block owns some keys and goes through its (batch, key head) pairs, for each
// through the query heads that share it, and for each of those through the chunks of 64 queries that can see its keys.
#pragma once
#include "cuda/mask_tile.cuh"
#include "cuda/ring.cuh"

namespace lam {
namespace cuda {
namespace {

// kMaps: results of the op, 1 or 2.
template <int kMaps>
struct KeyWalk {
  const MaskedAttentionCall& c;
  int first_key, first_member, member, end_member;  // members are (batch, key head) pairs
  int b, key_head, h, chunk;
  int group;

  __device__ __forceinline__ KeyWalk(const MaskedAttentionCall& call, int block) : c(call) {
    const Slices& s = c.key_slices;
    first_key = block % s.row_blocks * keys();
    const int split = block / s.row_blocks;
    first_member = static_cast<int>(static_cast<int64_t>(s.members) * split / s.splits);
    end_member = static_cast<int>(static_cast<int64_t>(s.members) * (split + 1) / s.splits);
    member = first_member;
    group = static_cast<int>(c.p.H / c.p.Hkv);
    enter();
  }
  // computed where they are used: every register counts here
  __device__ __forceinline__ int chunks() const { return (static_cast<int>(c.p.Lq) + kChunk - 1) / kChunk; }
  __device__ __forceinline__ int keys() const { return 16 * c.keys.warps; }
  __device__ __forceinline__ bool done() const { return member >= end_member; }
  // A pair's first step comes even if nobody sees its keys: its results are written all the same.
  __device__ __forceinline__ bool is_first() const { return h == key_head * group && chunk == 0; }
  __device__ __forceinline__ void enter() {
    if (done()) return;
    const int B = static_cast<int>(c.p.B), Hkv = static_cast<int>(c.p.Hkv);
    b = c.key_slices.share_h ? member % B : member / Hkv;
    key_head = c.key_slices.share_h ? member / B : member % Hkv;
    chunk = 0, h = key_head * group;
  }
  __device__ __forceinline__ void advance() {
    do {
      if (++chunk == chunks()) {
        chunk = 0, ++h;
        if (h == (key_head + 1) * group) {
          ++member;
          return enter();
        }
      }
    } while (!chunk_sees_keys());
  }
  __device__ __forceinline__ bool chunk_sees_keys() const {
    const PatternSpec* spec = spec_of(c, h);
    if (!spec || kMaps == 2) return true;
    const int64_t Lq = c.p.Lq, first = static_cast<int64_t>(chunk) * kChunk, last = min64(first + kChunk, Lq) - 1;
    return row_range(*spec, first, Lq, c.p.Lk).start < first_key + keys() &&
           row_range(*spec, last, Lq, c.p.Lk).stop > first_key;
  }
  template <class T>
  __device__ __forceinline__ void issue(const Ring<T, KeyWalk>& ring) const {
    const MaskedAttentionParams& p = c.p;
    const Layout& l = c.keys;
    const int Lq = static_cast<int>(p.Lq), Lk = static_cast<int>(p.Lk), D = static_cast<int>(p.D);
    const int Dv = static_cast<int>(p.Dv);
    if (is_first()) {
      copy_rows(ring.rows(l.key, l.row_pitch, member), l.row_pitch, p.key, c.key_aligned, b, key_head, first_key,
                keys(), Lk, D, ring.threads);
      copy_rows(ring.rows(l.value, l.value_pitch, member), l.value_pitch, p.value, c.value_aligned, b, key_head,
                first_key, keys(), Lk, Dv, ring.threads);
    }
    copy_rows(ring.chunk(l.query, l.row_pitch, ring.issued), l.row_pitch, p.query, c.query_aligned, b, h,
              chunk * kChunk, kChunk, Lq, D, ring.threads);
    copy_rows(ring.chunk(l.grad_out, l.value_pitch, ring.issued), l.value_pitch, p.grad_out, c.grad_out_aligned, b, h,
              chunk * kChunk, kChunk, Lq, Dv, ring.threads);
    if constexpr (kMaps == 2)
      copy_rows(ring.chunk(l.near_grad_out, l.value_pitch, ring.issued), l.value_pitch, c.near.grad_out,
                c.near.grad_out_aligned, b, h, chunk * kChunk, kChunk, Lq, Dv, ring.threads);
  }
};

// lse and shift of the queries of a chunk, of one map.
struct QueryStatistics {
  float *lse, *shift;

  __device__ __forceinline__ QueryStatistics(unsigned char* memory, int lse_at, int shift_at)
      : lse(at<float>(memory, lse_at)), shift(at<float>(memory, shift_at)) {}
  template <class Walk>
  __device__ __forceinline__ void load(const View& of, const float* left, const Walk& now, const Threads& threads) {
    const MaskedAttentionParams& p = now.c.p;
    const int first = now.chunk * kChunk;
    for (int k = threads.id; k < kChunk; k += threads.count) {
      const bool inside = first + k < p.Lq;
      const float value = inside ? static_cast<const float*>(of.data)[now.b * of.stride[0] + now.h * of.stride[1] +
                                                                      (first + k) * of.stride[2]]
                                 : -kInfinity;
      lse[k] = value == -kInfinity ? kInfinity : value;  // a row that sees no key: every weight 0
      shift[k] = inside && left ? left[(now.b * p.H + now.h) * p.Lq + first + k] : 0.f;
    }
  }
  __device__ __forceinline__ float lse_of(int i) const { return ptx::shared_load(lse + i); }
  __device__ __forceinline__ float shift_of(int i) const { return ptx::shared_load(shift + i); }
};

// Masks, bits, lse and shift of one chunk of queries and the block's keys.
template <int kMaps>
struct KeyMasks {
  const MaskedAttentionCall& c;
  using Tile = MaskTile<false, kMaps == 1>;
  Tile multiplier, bias;
  uint32_t *visible, *kept, *key_visible;
  QueryStatistics rows, near_rows;
  int words, visible_of = -1, kept_of = -1, keys_of = -1;

  __device__ __forceinline__ KeyMasks(const MaskedAttentionCall& call, unsigned char* memory)
      : c(call),
        multiplier(memory, call.keys, call.keys.multiplier, call.p.multiplier, call.p.multiplier_factors),
        bias(memory, call.keys, call.keys.bias, call.p.bias, call.p.bias_factors),
        visible(at<uint32_t>(memory, call.keys.visible)),
        kept(call.keys.kept < 0 ? nullptr : at<uint32_t>(memory, call.keys.kept)),
        key_visible(at<uint32_t>(memory, call.keys.key_visible)),
        rows(memory, call.keys.lse, call.keys.shift),
        near_rows(memory, call.keys.near_lse, call.keys.near_shift),
        words((call.keys.warps + 1) / 2) {}

  __device__ __forceinline__ void load(const KeyWalk<kMaps>& now, const Threads& threads) {
    const MaskedAttentionParams& p = c.p;
    const int i = now.chunk * kChunk, j = now.first_key, H = static_cast<int>(p.H);
    bring(multiplier, now, false, threads);
    bring(bias, now, p.gate, threads);
    const int visible_by = ((c.visible_by_b ? now.b * H : 0) + (c.visible_by_h ? now.h : 0)) * now.chunks() + now.chunk;
    if (visible_of != visible_by) {
      load_visible(visible, c, now.b, now.h, i, kChunk, j, words, threads);
      visible_of = visible_by;
    }
    if (keys_of != now.b) {
      load_key_visible(key_visible, c, now.b, j, words, threads);
      keys_of = now.b;
    }
    const int kept_by = (now.b * H + now.h) * now.chunks() + now.chunk;
    if (kMaps == 1 && kept && kept_of != kept_by) {
      load_kept(kept, c, now.b, now.h, i, kChunk, j, words, threads);
      kept_of = kept_by;
    }
    rows.load(p.lse, c.shift, now, threads);
    if constexpr (kMaps == 2) near_rows.load(c.near.lse, c.near.shift, now, threads);
    __syncthreads();
  }
  // Tiles of factors stay for all chunks where they fit: built once for all heads that share them.
  __device__ __forceinline__ void bring(Tile& tile, const KeyWalk<kMaps>& now, bool logarithm, const Threads& threads) {
    const int kept = kMaps == 1 && tile.f.rank > 0 ? c.keys.mask_chunks : 1;
    const int first = kept > 1 ? 0 : now.chunk * kChunk;
    tile.bring(c.p, now.b, now.h, first, kept * kChunk, now.first_key, now.keys(), logarithm, threads);
    if (kept > 1) tile.shown = tile.data + now.chunk * kChunk * tile.pitch;
  }
  // The lane's pairs with the 8 N queries from `first` on, as bits 4 n + e. No bits or no keys: all.
  template <int N>
  __device__ __forceinline__ uint32_t pairs_of(const uint32_t* bits, const uint32_t* keys, int first, int warp_key,
                                               const Lane& lane) const {
    const int word = warp_key / 32, place = warp_key % 32 + lane.row;
    const uint32_t key_word = keys ? keys[word] : ~0u;
    uint32_t pairs = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t column = ((bits ? bits[(first + n * 8 + lane.column + e) * words + word] : ~0u) & key_word) >> place;
        pairs |= (column & 1) << (4 * n + e) | (column >> 8 & 1) << (4 * n + e + 2);
      }
    return pairs;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace lam
