// A tile of a learned mask in shared memory: loaded from a dense one, built from factors.
#pragma once
#include "cuda/low_rank.cuh"

namespace lam {
namespace cuda {
namespace {

// In fp32. One row where the mask has one (pitch 0), one pair of equal columns where it has one column (column_mask 0).
// A gate's tile holds log M, so that it is a bias to all that follows.
// kByRows: neighbouring columns are read together; else neighbouring rows (the pitch is for that, see tile_pitch).
// kFactors: whether the op takes a mask by its factors.
template <bool kByRows, bool kFactors>
struct MaskTile {
  const View& v;
  const Factors& f;
  float *data, *stage;
  const float* shown;  // from which row on it is read
  int pitch, column_mask;
  int loaded_slice = -1, loaded_row = -1;  // what it holds; a block's columns are always the same

  __device__ __forceinline__ MaskTile(unsigned char* memory, const Layout& l, int offset, const View& dense,
                                      const Factors& factors)
      : v(dense),
        f(factors),
        data(offset < 0 ? nullptr : at<float>(memory, offset)),
        stage(l.factors < 0 ? nullptr : at<float>(memory, l.factors)),
        shown(data),
        pitch(f.rank > 0 ? l.tile_pitch : v.stride[2] == 0 ? 0 : v.stride[3] == 0 ? 8 : l.tile_pitch),
        column_mask(f.rank == 0 && v.stride[3] == 0 ? 0 : ~0) {}

  // Whether something was loaded, which the block must then wait for.
  __device__ __forceinline__ bool bring(const MaskedAttentionParams& p, int b, int h, int i, int rows, int j,
                                        int columns, bool logarithm, const Threads& threads) {
    if (!data) return false;
    const bool built = kFactors && f.rank > 0;
    // not by address: in a view whose rows overlap, tiles of two samples may begin at one
    const int slice = own(0, b) * static_cast<int>(p.H) + own(1, h), row = own(2, i);
    if (loaded_slice == slice && loaded_row == row) return false;
    loaded_slice = slice, loaded_row = row;
    const int Lq = static_cast<int>(p.Lq), Lk = static_cast<int>(p.Lk);
    if (built) build_mask_tile<kByRows>(data, pitch, stage, f, b, h, i, rows, Lq, j, columns, Lk, threads);
    else load(at_pair(b, h, i, j), i, rows, Lq, j, columns, Lk, logarithm, threads);
    return true;
  }
  // Columns `column` and `column + 1`, column even.
  __device__ __forceinline__ float2 pair(int row, int column) const {
    return ptx::shared_load(reinterpret_cast<const float2*>(shown + row * pitch + (column & column_mask)));
  }
  __device__ __forceinline__ float one(int row, int column) const {
    return ptx::shared_load(shown + row * pitch + (column & column_mask));
  }

 private:
  __device__ __forceinline__ int64_t at_pair(int b, int h, int i, int j) const {
    return b * v.stride[0] + h * v.stride[1] + i * v.stride[2] + j * v.stride[3];
  }
  // 0 where the mask is the same along the axis
  __device__ __forceinline__ int own(int axis, int index) const {
    if (!kFactors || f.rank == 0) return v.stride[axis] == 0 ? 0 : index;
    return axis > 1 || (f.rows.stride[axis] | f.columns.stride[axis] | f.offset.stride[axis]) ? index : 0;
  }
  __device__ __forceinline__ void load(int64_t base, int i, int rows, int Lq, int j, int columns, int Lk,
                                       bool logarithm, const Threads& threads) {
    if (pitch == 0) rows = 1;
    if (column_mask == 0) columns = 2;
    for (int k = threads.id; k < rows * columns; k += threads.count) {
      const int r = k / columns, c = k - r * columns;
      float value = 0.f;
      if ((i + r < Lq || pitch == 0) && (column_mask == 0 || j + c < Lk)) {
        value = load_mask_value(v, base + r * v.stride[2] + c * v.stride[3]);
        if (logarithm) value = value == 0.f ? -kInfinity : logf(value);
      }
      data[r * pitch + c] = value;
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace lam
