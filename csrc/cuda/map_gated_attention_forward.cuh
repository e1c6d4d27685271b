// Forward of map_gated_attention: one launch. A block holds its rows of both maps, forms 64 columns of the gate at a time
// and weighs the values with the mixed map at once. Formulas: python_ref/map_gated_attention.py.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/map_rows.cuh"

namespace lam {
namespace cuda {
namespace {

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) map_gated_forward_kernel(GRID_CONSTANT(MapGatedCall, call)) {
  DYNAMIC_SHARED_MEMORY(memory);
  MapRows<T> rows(call, memory);
  const MapGateLayout& l = call.layout;
  const int block = static_cast<int>(blockIdx.x);
  rows.enter(block / call.row_blocks, block % call.row_blocks);
  rows.form_maps();
  float o[Width / 8][4], sum[2] = {0.f, 0.f};
  clear(o);
#pragma unroll 1
  for (int number = 0; number < rows.chunks; ++number) {
    float u[kTiles][4];
    rows.form_gate(u, number);
    rows.each_pair(number, [&](int place, int half, int n) {
      const float2 x = rows.get(rows.whole, place), y = rows.get(rows.near, place);
      u[n][2 * half] = mixed(u[n][2 * half], x.x, y.x);
      u[n][2 * half + 1] = mixed(u[n][2 * half + 1], x.y, y.y);
      sum[half] += u[n][2 * half] + u[n][2 * half + 1];
    });
    rows.bring_values(number);
    Products<T>::accumulate(o, u, rows.chunk, l.value_pitch, static_cast<int>(rows.p.Dv), rows.weights, rows.lane);
  }
  float factor[2] = {1.f, 1.f};
  if (call.renormalise)
#pragma unroll
    for (int half = 0; half < 2; ++half) factor[half] = rows.reciprocal(sum_of_row(sum[half]));
  store_rows<T>(o, factor[0], factor[1], rows.p.out, rows.b, rows.h, rows.first_row + rows.warp_row, rows.length,
                static_cast<int>(rows.p.Dv), rows.lane);
}

}  // namespace

template <class T, int Width>
const char* launch_map_gated_forward(const MapGatedCall& call, void* stream) {
  return launch(map_gated_forward_kernel<T, Width>, call.blocks, 32 * call.layout.warps, call.layout.bytes, call,
                stream);
}

}  // namespace cuda
}  // namespace lam
