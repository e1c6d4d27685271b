// Between the products: scores under their masks, the running softmax, and what the backward pass needs of a row.
#pragma once
#include "cuda/row_blocks.cuh"

namespace lam {
namespace cuda {
namespace {

// Mask values of the lane's pairs of eight keys; 1 and 0 where there is no mask.
struct MaskPairs {
  float2 factor[2] = {{1.f, 1.f}, {1.f, 1.f}}, add[2] = {{0.f, 0.f}, {0.f, 0.f}};

  __device__ __forceinline__ MaskPairs(const RowMasks& masks, int row, int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (masks.multiplier.data) factor[half] = masks.multiplier.pair(row + 8 * half, column);
      if (masks.bias.data) add[half] = masks.bias.pair(row + 8 * half, column);
    }
  }
  __device__ __forceinline__ float factor_of(int e) const { return e & 1 ? factor[e >> 1].y : factor[e >> 1].x; }
  __device__ __forceinline__ float add_of(int e) const { return e & 1 ? add[e >> 1].y : add[e >> 1].x; }
};

// Products of query and key become what the softmax is taken of, -inf where hidden.
template <int K, int N>
__device__ __forceinline__ void fuse_scores(float (&s)[K][4], const uint32_t (&seen)[2][N], const RowMasks& masks,
                                            int row, int column, float scale) {
#pragma unroll
  for (int n = 0; n < K; ++n) {
    const MaskPairs mask(masks, row, column + n * 8);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool visible = bit_of(seen, n, e) && mask.add_of(e) != -kInfinity;
      s[n][e] = visible ? fmaf(s[n][e] * scale, mask.factor_of(e), mask.add_of(e)) : -kInfinity;
    }
  }
}

__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Exact where the difference is: at large scores a product with log2(e) that comes first would cost the weight.
__device__ __forceinline__ float exp_of_difference(float x, float y) { return exp2f((x - y) * kLog2e); }

// The running maximum and sum of a warp's 16 rows, and the values weighted so far (online softmax, arXiv 1805.02867).
template <int N>
struct RunningSoftmax {
  float o[N][4], largest[2], sum[2];

  __device__ __forceinline__ void reset() {
    clear(o);
    largest[0] = largest[1] = -kInfinity, sum[0] = sum[1] = 0.f;
  }
  // Scores become weights relative to the largest so far.
  template <int K>
  __device__ __forceinline__ void weigh(float (&s)[K][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int n = 0; n < K; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      most = max_of_row(most);
      const float reference = most == -kInfinity ? 0.f : most;  // a row that has seen nothing yet
      const float shrink = exp_of_difference(largest[half], reference);
      largest[half] = most;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < N; ++n) o[n][2 * half] *= shrink, o[n][2 * half + 1] *= shrink;
#pragma unroll
      for (int n = 0; n < K; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[n][e] = exp_of_difference(s[n][e], reference);
          sum[half] += s[n][e];
        }
    }
  }
  // After the last chunk: the results of the warp's rows, times a factor, and their lse.
  template <class T>
  __device__ __forceinline__ void store(const View& out, const View& lse, const RowWalk& now, int warp_row,
                                        float factor, const Lane& lane) const {
    const int Lq = static_cast<int>(now.c.p.Lq), Dv = static_cast<int>(now.c.p.Dv);
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = sum_of_row(sum[half]);
      const bool empty = largest[half] == -kInfinity && total == 0.f;
      factors[half] = empty ? 0.f : factor / total;
      const int i = now.first_row + warp_row + lane.row + 8 * half;
      if (lane.id % 4 == 0 && i < Lq)
        static_cast<float*>(lse.data)[now.b * lse.stride[0] + now.h * lse.stride[1] + i * lse.stride[2]] =
            empty ? -kInfinity : largest[half] + logf(total);
    }
    store_rows<T>(o, factors[0], factors[1], out, now.b, now.h, now.first_row + warp_row, Lq, Dv, lane);
  }
};

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

// What the backward pass needs of a row of one map: its lse, inf where it sees no key (every weight is then 0), and
// delta - grad_lse.
struct RowStatistics {
  float lse, shift;

  // The shift is left for the second launch where there is a place for it.
  template <class T>
  __device__ __forceinline__ void load(const T* grad_out, const View& out, const View& lse_of, const View& grad_lse,
                                       float* left, const RowWalk& now, int row, const Lane& lane) {
    const MaskedAttentionParams& p = now.c.p;
    const int Lq = static_cast<int>(p.Lq), i = now.first_row + row;
    lse = kInfinity;
    shift = delta_of(grad_out, out, now, row, Lq, static_cast<int>(p.Dv), lane);
    if (i >= Lq) return;
    const float value = value_of_row(lse_of, now, i);
    if (value != -kInfinity) lse = value;
    if (grad_lse.data) shift -= value_of_row(grad_lse, now, i);
    if (left && lane.id % 4 == 0) left[(now.b * p.H + now.h) * p.Lq + i] = shift;
  }
  static __device__ __forceinline__ float value_of_row(const View& v, const RowWalk& now, int i) {
    return static_cast<const float*>(v.data)[now.b * v.stride[0] + now.h * v.stride[1] + i * v.stride[2]];
  }
};

}  // namespace
}  // namespace cuda
}  // namespace lam
