// Matrix products of one warp. 16 rows of scores lie in fragments s[n][e]: lane 4 g + c holds rows g (e = 0, 1)
// and g + 8 (e = 2, 3) at columns 8 n + 2 c + (e & 1). Half types run on tensor cores, fp32 in exact FMAs with the same
// fragments, so that everything between two products is written once.
#pragma once
#include "cuda/ptx.cuh"

namespace lam {
namespace cuda {
namespace {

constexpr int kTiles = 8;  // of 8 columns: 64 scores a row

struct Lane {
  int id, row, column;  // row g, column 2 c
  __device__ __forceinline__ explicit Lane(int thread) : id(thread % 32), row(id / 4), column(2 * (id % 4)) {}
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, pair, 4);
  return word;
}

template <class T>
struct Products {
  // s += A B^T: 16 rows of A, 8 K of B, `depth` columns of both (zeros up to a multiple of 16).
  template <int K>
  static __device__ __forceinline__ void scores(float (&s)[K][4], const T* a, int a_pitch, const T* b, int b_pitch,
                                                int depth, const Lane& lane) {
    const T* a_row = a + (lane.id % 16) * a_pitch + lane.id / 16 * 8;
    const T* b_row = b + (lane.id / 16 * 8 + lane.id % 8) * b_pitch + lane.id / 8 % 2 * 8;
#pragma unroll 1
    for (int d = 0; d < depth; d += 16) {
      uint32_t fa[4];
      ptx::ldmatrix_x4(fa, a_row + d);
#pragma unroll
      for (int n = 0; n < K; n += 2) {
        uint32_t fb[4];
        ptx::ldmatrix_x4(fb, b_row + n * 8 * b_pitch + d);
        const uint32_t first[2] = {fb[0], fb[1]}, second[2] = {fb[2], fb[3]};
        ptx::mma_16816<T>(s[n], fa, first);
        ptx::mma_16816<T>(s[n + 1], fa, second);
      }
    }
  }

  // o += S B: 8 K rows of B, `width` columns of it (zeros up to a multiple of 16).
  template <int N, int K>
  static __device__ __forceinline__ void accumulate(float (&o)[N][4], const float (&s)[K][4], const T* b,
                                                    int b_pitch, int width, float*, const Lane& lane) {
    const T* b_row = b + (lane.id % 16) * b_pitch + lane.id / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 2) {
      const uint32_t fa[4] = {pack<T>(s[k][0], s[k][1]), pack<T>(s[k][2], s[k][3]), pack<T>(s[k + 1][0], s[k + 1][1]),
                              pack<T>(s[k + 1][2], s[k + 1][3])};
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        if (n * 8 >= width) break;
        uint32_t fb[4];
        ptx::ldmatrix_x4_trans(fb, b_row + k * 8 * b_pitch + n * 8);
        const uint32_t first[2] = {fb[0], fb[1]}, second[2] = {fb[2], fb[3]};
        ptx::mma_16816<T>(o[n], fa, first);
        ptx::mma_16816<T>(o[n + 1], fa, second);
      }
    }
  }
};

template <>
struct Products<float> {
  static __device__ __forceinline__ float dot(const float4& x, const float4& y, float sum) {
    sum = fmaf(x.x, y.x, sum);
    sum = fmaf(x.y, y.y, sum);
    sum = fmaf(x.z, y.z, sum);
    return fmaf(x.w, y.w, sum);
  }
  static __device__ __forceinline__ float4 quad(const float* p) {
    return ptx::shared_load(reinterpret_cast<const float4*>(p));
  }

  template <int K>
  static __device__ __forceinline__ void scores(float (&s)[K][4], const float* a, int a_pitch, const float* b,
                                                int b_pitch, int depth, const Lane& lane) {
    const float* a_row = a + lane.row * a_pitch;
    const float* b_row = b + lane.column * b_pitch;
#pragma unroll 1
    for (int d = 0; d < depth; d += 4) {
      const float4 top = quad(a_row + d), bottom = quad(a_row + 8 * a_pitch + d);
#pragma unroll
      for (int n = 0; n < K; ++n) {
        const float4 left = quad(b_row + n * 8 * b_pitch + d), right = quad(b_row + (n * 8 + 1) * b_pitch + d);
        s[n][0] = dot(top, left, s[n][0]);
        s[n][1] = dot(top, right, s[n][1]);
        s[n][2] = dot(bottom, left, s[n][2]);
        s[n][3] = dot(bottom, right, s[n][3]);
      }
    }
  }

  // o += A B: 16 rows of A, `depth` rows of B, a multiple of 4.
  template <int N>
  static __device__ __forceinline__ void multiply(float (&o)[N][4], const float* a, int a_pitch, const float* b,
                                                  int b_pitch, int depth, int width, const Lane& lane) {
    const float* row = a + lane.row * a_pitch;
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      const float4 top = quad(row + k), bottom = quad(row + 8 * a_pitch + k);
      const float tops[4] = {top.x, top.y, top.z, top.w}, bottoms[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) add_row(o, tops[r], bottoms[r], b + (k + r) * b_pitch, width, lane);
    }
  }
  // o += A^T B: `depth` rows of A and B, 16 columns of A.
  template <int N>
  static __device__ __forceinline__ void multiply_transposed(float (&o)[N][4], const float* a, int a_pitch,
                                                             const float* b, int b_pitch, int depth, int width,
                                                             const Lane& lane) {
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      const float* column = a + k * a_pitch + lane.row;
      add_row(o, ptx::shared_load(column), ptx::shared_load(column + 8), b + k * b_pitch, width, lane);
    }
  }
  template <int N>
  static __device__ __forceinline__ void add_row(float (&o)[N][4], float top, float bottom, const float* b, int width,
                                                 const Lane& lane) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n * 8 >= width) break;
      const float2 x = ptx::shared_load(reinterpret_cast<const float2*>(b + lane.column + n * 8));
      o[n][0] = fmaf(top, x.x, o[n][0]);
      o[n][1] = fmaf(top, x.y, o[n][1]);
      o[n][2] = fmaf(bottom, x.x, o[n][2]);
      o[n][3] = fmaf(bottom, x.y, o[n][3]);
    }
  }

  // The warp's weights pass through shared memory: a lane needs those of all four lanes of its rows.
  template <int N, int K>
  static __device__ __forceinline__ void accumulate(float (&o)[N][4], const float (&s)[K][4], const float* b,
                                                    int b_pitch, int width, float* weights, const Lane& lane) {
    constexpr int kPitch = kTiles * 8 + 4;
    float* mine = weights + lane.row * kPitch + lane.column;
#pragma unroll
    for (int n = 0; n < K; ++n) {
      *reinterpret_cast<float2*>(mine + n * 8) = make_float2(s[n][0], s[n][1]);
      *reinterpret_cast<float2*>(mine + 8 * kPitch + n * 8) = make_float2(s[n][2], s[n][3]);
    }
    __syncwarp();
    multiply(o, weights, kPitch, b, b_pitch, K * 8, width, lane);
    __syncwarp();  // the next product writes the weights again
  }
};

template <int N>
__device__ __forceinline__ void clear(float (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = 0.f;
}

}  // namespace
}  // namespace cuda
}  // namespace lam
