// What a block brings into shared memory: rows of query, key and value, visibility and dropout as bits.
#pragma once
#include "cuda/masked_attention.h"
#include "cuda/products.cuh"
#include "patterns.h"
#include "philox.h"

namespace lam {
namespace cuda {
namespace {

// log2(e), for exp by way of exp2
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

template <class T>
__device__ __forceinline__ T* at(unsigned char* memory, int offset) {
  return reinterpret_cast<T*>(memory + offset);
}

struct Threads {
  int id, count, warp;
  __device__ __forceinline__ Threads()
      : id(static_cast<int>(threadIdx.x)), count(static_cast<int>(blockDim.x)), warp(id / 32) {}
};

// Rows first ... first + rows - 1 of an operand, zeros below its last row and beyond its last column.
template <class T>
__device__ __forceinline__ void copy_rows(T* to, int pitch, const View& v, bool aligned, int64_t b, int64_t h,
                                          int first, int rows, int L, int width, const Threads& threads) {
  constexpr int kElements = 16 / sizeof(T);
  const int pieces = (width + 15) / 16 * (16 / kElements);
  const T* from = static_cast<const T*>(v.data) + b * v.stride[0] + h * v.stride[1];
  for (int k = threads.id; k < rows * pieces; k += threads.count) {
    const int r = k / pieces, c = (k - r * pieces) * kElements;
    const int left = first + r < L ? (width - c < kElements ? width - c : kElements) : 0;
    T* target = to + r * pitch + c;
    if (aligned) {
      const T* source = left > 0 ? from + (first + r) * v.stride[2] + c : static_cast<const T*>(v.data);
      ptx::cp_async16(target, source, left > 0 ? left * static_cast<int>(sizeof(T)) : 0);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        target[e] = e < left ? from[(first + r) * v.stride[2] + c + e] : from_float<T>(0.f);
    }
  }
}

// Waits until all but `kept` groups of copies have arrived.
__device__ __forceinline__ void wait_for_copies(int kept) {
  switch (kept) {
    case 0: return ptx::cp_async_wait<0>();
    case 1: return ptx::cp_async_wait<1>();
    case 2: return ptx::cp_async_wait<2>();
    case 3: return ptx::cp_async_wait<3>();
    case 4: return ptx::cp_async_wait<4>();
    default: return ptx::cp_async_wait<5>();
  }
}

__device__ __forceinline__ float load_mask_value(const View& v, int64_t offset) {
  switch (v.dtype) {
    case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(v.data)[offset]);
    case DType::f16: return to_float(static_cast<const __half*>(v.data)[offset]);
    default: return static_cast<const float*>(v.data)[offset];
  }
}

__device__ __forceinline__ void store_mask_value(const View& v, int64_t offset, float value) {
  switch (v.dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(v.data)[offset] = from_float<__nv_bfloat16>(value); return;
    case DType::f16: static_cast<__half*>(v.data)[offset] = from_float<__half>(value); return;
    default: static_cast<float*>(v.data)[offset] = value;
  }
}

__device__ __forceinline__ void add_to_tile(float* to, float x) { ptx::shared_store(to, ptx::shared_load(to) + x); }
__device__ __forceinline__ void add_to_tile(float* to, float x, float y) {
  float2* sum = reinterpret_cast<float2*>(to);
  const float2 old = ptx::shared_load(sum);
  ptx::shared_store(sum, make_float2(old.x + x, old.y + y));
}

// ---- visibility: one bit a pair, a word for 32 keys

__device__ __forceinline__ uint32_t bits_between(int first, int stop) {  // within a word; both may lie outside
  first = first < 0 ? 0 : first, stop = stop > 32 ? 32 : stop;
  if (first >= stop) return 0;
  return (~0u >> (32 - (stop - first))) << first;
}

__device__ __forceinline__ const PatternSpec* spec_of(const MaskedAttentionCall& c, int h) {
  return c.n_specs == 0 ? nullptr : &c.specs[c.spec_of_head[c.p.n_patterns == 1 ? 0 : h]];
}

// What pattern and attn_mask keep of rows x words; nothing at and beyond Lq and Lk.
__device__ __forceinline__ void load_visible(uint32_t* bits, const MaskedAttentionCall& c, int b, int h, int first,
                                             int rows, int j0, int words, const Threads& threads) {
  const int Lq = static_cast<int>(c.p.Lq), Lk = static_cast<int>(c.p.Lk);
  const PatternSpec* spec = spec_of(c, h);
  const View& mask = c.p.attn_mask;
  for (int k = threads.id; k < rows * words; k += threads.count) {
    const int i = first + k / words, j = j0 + k % words * 32;
    uint32_t word = 0;
    if (i < Lq) {
      word = bits_between(0, Lk - j);
      bool by_pair = false;
      if (spec) {
        const KeyRange range = row_range(*spec, i, Lq, Lk);
        word &= bits_between(static_cast<int>(range.start) - j, static_cast<int>(range.stop) - j);
        for (int t = 0; t < spec->n_terms; ++t)
          by_pair |= spec->terms[t].kind == PatternKind::dilated_toeplitz || spec->terms[t].kind == PatternKind::segments;
      }
      if (by_pair || mask.data)
        for (int bit = 0; bit < 32; ++bit) {
          if (!(word >> bit & 1)) continue;
          bool seen = true;
          if (mask.data)
            seen = static_cast<const uint8_t*>(mask.data)[b * mask.stride[0] + h * mask.stride[1] +
                                                          i * mask.stride[2] + (j + bit) * mask.stride[3]] != 0;
          for (int t = 0; by_pair && seen && t < spec->n_terms; ++t)
            seen = off_range_visible(spec->terms[t], c.segments, b, i, j + bit, Lq, Lk);
          if (!seen) word &= ~(1u << bit);
        }
    }
    bits[k] = word;
  }
}

__device__ __forceinline__ void load_key_visible(uint32_t* bits, const MaskedAttentionCall& c, int b, int j0, int words,
                                                 const Threads& threads) {
  const View& mask = c.p.key_mask;
  for (int w = threads.warp; w < words; w += threads.count / 32) {
    const int j = j0 + w * 32 + threads.id % 32;
    const bool seen = j < c.p.Lk && (!mask.data || static_cast<const uint8_t*>(
                                                       mask.data)[b * mask.stride[0] + j * mask.stride[3]] != 0);
    const uint32_t word = __ballot_sync(~0u, seen);
    if (threads.id % 32 == 0) bits[w] = word;
  }
}

// Pairs that dropout keeps.
__device__ __forceinline__ void load_kept(uint32_t* bits, const MaskedAttentionCall& c, int b, int h, int first,
                                          int rows, int j0, int words, const Threads& threads) {
  const MaskedAttentionParams& p = c.p;
  const uint32_t threshold = dropout_threshold(p.dropout_p), offset = static_cast<uint32_t>(p.dropout_offset);
  const uint32_t low = static_cast<uint32_t>(p.dropout_seed);
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(p.dropout_seed) >> 32);
  for (int k = threads.id; k < rows * words; k += threads.count) {
    const int i = first + k / words, j = j0 + k % words * 32;
    uint32_t word = 0;
#pragma unroll 1
    for (int four = 0; four < 8; ++four) {
      const Philox4 x = philox4x32_10(static_cast<uint32_t>(j / 4 + four), static_cast<uint32_t>(i),
                                      static_cast<uint32_t>(b * p.H + h), offset, low, high);
#pragma unroll
      for (int n = 0; n < 4; ++n) word |= static_cast<uint32_t>(x.word[n] >= threshold) << (4 * four + n);
    }
    bits[k] = word;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lam
