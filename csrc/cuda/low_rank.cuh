// Masks given by their factors, M = rows columns^T + offset: a tile of M is built in shared memory, and the gradient G of
// a tile is folded into drows = G columns, dcolumns = G^T rows and doffset, the sums of G's columns. Products are fp32
// FMAs whatever the factors' dtype is: a tile is built once for all pairs that share it.
#pragma once
#include "cuda/tiles.cuh"

namespace lam {
namespace cuda {
namespace {

constexpr int kFactorPitch = kRankStep + 4;  // of staged ranks: eight rows lie in different banks

// kRankStep ranks of `rows` rows of a factor, in fp32, zeros beyond its ends.
__device__ __forceinline__ void stage_factor(float* to, const View& v, int b, int h, int first, int rows, int L,
                                             int first_rank, int64_t rank, const Threads& threads) {
  const int64_t from = b * v.stride[0] + h * v.stride[1] + first_rank;
  for (int k = threads.id; k < rows * kRankStep; k += threads.count) {
    const int r = k / kRankStep, d = k % kRankStep;
    const bool inside = first + r < L && first_rank + d < rank;
    to[r * kFactorPitch + d] = inside ? load_mask_value(v, from + (first + r) * v.stride[2] + d) : 0.f;
  }
}

// rows x columns, multiples of 16, of M from (i, j) on, by the whole block, which waits for the last ranks itself.
// kByRows: mask_tile.cuh. Two neighbours of a lane are stored at once, or rows and columns change places.
template <bool kByRows>
__device__ __forceinline__ void build_mask_tile(float* tile, int pitch, float* stage, const Factors& f, int b, int h,
                                                int i, int rows, int Lq, int j, int columns, int Lk,
                                                const Threads& threads) {
  const Lane lane(threads.id);
  for (int k = threads.id; k < rows * columns; k += threads.count) {
    const int r = k / columns, c = k - r * columns;
    const View& v = f.offset;
    const bool inside = v.data && j + c < Lk;
    tile[r * pitch + c] =
        inside ? load_mask_value(v, b * v.stride[0] + h * v.stride[1] + (j + c) * v.stride[3]) : 0.f;
  }
#pragma unroll 1
  for (int r0 = 0; r0 < rows; r0 += kChunk) {
    const int some_rows = rows - r0 < kChunk ? rows - r0 : kChunk;
    float* staged_columns = stage + some_rows * kFactorPitch;
#pragma unroll 1
    for (int c0 = 0; c0 < columns; c0 += kChunk) {
      const int some_columns = columns - c0 < kChunk ? columns - c0 : kChunk, across = some_columns / 16;
#pragma unroll 1
      for (int rank = 0; rank < f.rank; rank += kRankStep) {
        __syncthreads();
        stage_factor(stage, f.rows, b, h, i + r0, some_rows, Lq, rank, f.rank, threads);
        stage_factor(staged_columns, f.columns, b, h, j + c0, some_columns, Lk, rank, f.rank, threads);
        __syncthreads();
        // always by the same warp: an element's ranks are added in their order
#pragma unroll 1
        for (int t = threads.warp; t < some_rows / 16 * across; t += threads.count / 32) {
          const int r = t / across * 16, c = t % across * 16;
          const float *of_rows = stage + r * kFactorPitch, *of_columns = staged_columns + c * kFactorPitch;
          float* to = tile + (r0 + r) * pitch + c0 + c;
          float m[2][4];
          clear(m);
          if constexpr (kByRows) Products<float>::scores(m, of_rows, kFactorPitch, of_columns, kFactorPitch, kRankStep, lane);
          else Products<float>::scores(m, of_columns, kFactorPitch, of_rows, kFactorPitch, kRankStep, lane);
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int line = lane.row + 8 * half, place = n * 8 + lane.column;
              if constexpr (kByRows) {
                add_to_tile(to + line * pitch + place, m[n][2 * half], m[n][2 * half + 1]);
              } else {
                add_to_tile(to + place * pitch + line, m[n][2 * half]);
                add_to_tile(to + (place + 1) * pitch + line, m[n][2 * half + 1]);
              }
            }
        }
      }
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lam
