// Backward of map_gated_attention: two launches, no atomics. In the first a block goes through its (batch, head) pairs
// and for each through all blocks of rows; dK and dV of the pair and the gates' gradients are summed in scratch memory
// that only this block touches, always by the same lane. The second adds the blocks' parts of the gates' gradients.
// Formulas: python_ref/map_gated_attention.py.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/map_rows.cuh"

namespace lam {
namespace cuda {
namespace {

// to[16 rows of keys from the warp's on, `width` columns] (+)= factor * A^T B for all keys, where value(i, j) is A and
// the rows of B are those of the block. The last of several blocks of rows stores the sum in T.
template <int N, class T, class F, class Store>
__device__ __forceinline__ void transposed_product(const MapRows<T>& rows, const T* b, int b_pitch, int width,
                                                   const F& value, const Store& store) {
  const Lane& lane = rows.lane;
#pragma unroll 1
  for (int j0 = rows.warp_row; j0 < rows.length; j0 += rows.rows()) {
    float o[N][4];
    clear(o);
#pragma unroll 1
    for (int i0 = 0; i0 < rows.rows(); i0 += 16) {
      float s[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[n][e] = value(i0 + n * 8 + lane.column + (e & 1), j0 + lane.row + 8 * (e >> 1));
      Products<T>::accumulate(o, s, b + i0 * b_pitch, b_pitch, width, rows.weights, lane);
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = j0 + lane.row + 8 * (e >> 1), d = n * 8 + lane.column + (e & 1);
        if (j < rows.length && d < width) store(j, d, o[n][e]);
      }
  }
}

template <class T, int Width>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) map_gated_backward_kernel(GRID_CONSTANT(MapGatedCall, call)) {
  DYNAMIC_SHARED_MEMORY(memory);
  MapRows<T> rows(call, memory);
  const MapGateLayout& l = call.layout;
  const MaskedAttentionParams& p = rows.p;
  const Lane& lane = rows.lane;
  const int64_t length = rows.length, gate_size = length * length;
  const int block = static_cast<int>(blockIdx.x), D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int pairs = static_cast<int>(p.B * p.H);
  const int first_pair = static_cast<int>(static_cast<int64_t>(pairs) * block / call.blocks);
  const int end_pair = static_cast<int>(static_cast<int64_t>(pairs) * (block + 1) / call.blocks);
  const bool maps = p.grad_query.data || p.grad_key.data;
  float* value_sums = call.row_sums ? call.row_sums + block * length * (D + Dv) : nullptr;
  float* key_sums = call.row_sums ? value_sums + length * Dv : nullptr;
  auto plane_at = [&](const float* plane, int i, int j) { return ptx::shared_load(plane + i * l.plane_pitch + j); };

#pragma unroll 1
  for (int step = first_pair * call.row_blocks; step < end_pair * call.row_blocks; ++step) {
    const int row_block = step % call.row_blocks;
    const bool first = row_block == 0, last = row_block + 1 == call.row_blocks;
    rows.enter(step / call.row_blocks, row_block);
    rows.form_maps();

    // R, and the gradient of the mixed map before it was divided by its sums
    float sum[2] = {0.f, 0.f}, along[2] = {0.f, 0.f}, inverse[2] = {1.f, 1.f};
#pragma unroll 1
    for (int number = 0; number < rows.chunks; ++number) {
      float u[kTiles][4];
      rows.form_gate(u, number);
      rows.each_pair(number, [&](int place, int half, int n) {
        rows.put(rows.gates, place, u[n][2 * half], u[n][2 * half + 1]);
      });
      rows.bring_values(number);
      clear(u);
      Products<T>::scores(u, rows.grad_out + rows.warp_row * l.value_pitch, l.value_pitch, rows.chunk, l.value_pitch,
                          Dv, lane);
      rows.each_pair(number, [&](int place, int half, int n) {
        const float2 r = rows.get(rows.gates, place), x = rows.get(rows.whole, place), y = rows.get(rows.near, place);
        const float left = mixed(r.x, x.x, y.x), right = mixed(r.y, x.y, y.y);
        sum[half] += left + right;
        along[half] += left * u[n][2 * half] + right * u[n][2 * half + 1];
        rows.put(rows.slopes, place, u[n][2 * half], u[n][2 * half + 1]);
      });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (call.renormalise) inverse[half] = rows.reciprocal(sum_of_row(sum[half]));
      along[half] = call.renormalise ? sum_of_row(along[half]) * inverse[half] : 0.f;
      if (lane.id % 4 == 0) ptx::shared_store(rows.inverse + rows.row + 8 * half, inverse[half]);
    }
    __syncthreads();
    if (p.grad_value.data)
      transposed_product<Width / 8>(
          rows, rows.grad_out, l.value_pitch, Dv,
          [&](int i, int j) {
            return ptx::shared_load(rows.inverse + i) *
                   mixed(plane_at(rows.gates, i, j), plane_at(rows.whole, i, j), plane_at(rows.near, i, j));
          },
          [&](int j, int d, float x) {
            if (!first) x += value_sums[j * Dv + d];
            if (!last) value_sums[j * Dv + d] = x;
            else
              static_cast<T*>(p.grad_value.data)[rows.b * p.grad_value.stride[0] + rows.h * p.grad_value.stride[1] +
                                                 j * p.grad_value.stride[2] + d] = from_float<T>(x);
          });
    __syncthreads();

    // the logit's gradient takes R's place; of the maps' own what does not come through it: map * gradient
    float mean[2] = {0.f, 0.f}, near_mean[2] = {0.f, 0.f};
#pragma unroll 1
    for (int number = 0; number < rows.chunks; ++number)
      rows.each_pair(number, [&](int place, int half, int) {
        const float2 r = rows.get(rows.gates, place), x = rows.get(rows.whole, place), y = rows.get(rows.near, place);
        const float2 given = rows.get(rows.slopes, place);
        const float left = (given.x - along[half]) * inverse[half], right = (given.y - along[half]) * inverse[half];
        const float2 of_whole = make_float2(x.x * left * r.x, x.y * right * r.y);
        const float2 of_near = make_float2(y.x * left * (1 - r.x), y.y * right * (1 - r.y));
        mean[half] += of_whole.x + of_whole.y, near_mean[half] += of_near.x + of_near.y;
        rows.put(rows.slopes, place, of_whole.x + of_near.x, of_whole.y + of_near.y);
        // the difference first: it is 0 where both maps agree
        rows.put(rows.gates, place, left * (x.x - y.x) * r.x * (1 - r.x), right * (x.y - y.y) * r.y * (1 - r.y));
      });

    const bool new_sums = step == first_pair * call.row_blocks;
#pragma unroll 1
    for (int number = 0; call.gate_parts && number < rows.chunks; ++number) {
      // 64 columns of the logit's gradient in T take a gate's place
      __syncthreads();
      rows.each_pair(number, [&](int place, int half, int n) {
        const float2 x = rows.get(rows.gates, place);
        T* to = rows.gate + (rows.row + 8 * half) * l.gate_pitch + n * 8 + lane.column;
        to[0] = from_float<T>(x.x), to[1] = from_float<T>(x.y);
      });
      __syncthreads();
      const int left = rows.length - number * kChunk, width = left < kChunk ? left : kChunk;
#pragma unroll 1
      for (int which = 0; which < 2; ++which) {
        if (!call.grad_gate[which].data) continue;
        const float* map = which == 0 ? rows.whole : rows.near;
        const float sign = which == 0 ? 1.f : -1.f;
        float* sums = call.gate_parts + (2 * block + which) * gate_size + number * kChunk;
        transposed_product<kTiles>(
            rows, rows.gate, l.gate_pitch, width, [&](int i, int j) { return sign * plane_at(map, i, j); },
            [&](int j, int d, float x) { sums[j * length + d] = new_sums ? x : sums[j * length + d] + x; });
      }
    }
    if (!maps) continue;

    // what comes through the gates
#pragma unroll 1
    for (int number = 0; number < rows.chunks; ++number)
#pragma unroll 1
      for (int which = 0; which < 2; ++which) {
        float u[kTiles][4];
        clear(u);
        rows.times_gate(u, rows.gates, which == 0 ? 1.f : -1.f, false, call.gate[which], true, number);
        const float* map = which == 0 ? rows.whole : rows.near;
        rows.each_pair(number, [&](int place, int half, int n) {
          const float2 x = rows.get(map, place), old = rows.get(rows.slopes, place);
          const float left = x.x * u[n][2 * half], right = x.y * u[n][2 * half + 1];
          if (which == 0) mean[half] += left + right;
          else near_mean[half] += left + right;
          rows.put(rows.slopes, place, old.x + left, old.y + right);
        });
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mean[half] = sum_of_row(mean[half]), near_mean[half] = sum_of_row(near_mean[half]);
    }
    const float scale = static_cast<float>(p.scale);
    float dq[Width / 8][4];
    clear(dq);
#pragma unroll 1
    for (int number = 0; number < rows.chunks; ++number) {
      rows.each_pair(number, [&](int place, int half, int) {
        const float2 x = rows.get(rows.whole, place), y = rows.get(rows.near, place);
        const float2 old = rows.get(rows.slopes, place);
        rows.put(rows.slopes, place, old.x - x.x * mean[half] - y.x * near_mean[half],
                 old.y - x.y * mean[half] - y.y * near_mean[half]);
      });
      if (!p.grad_query.data) continue;
      rows.bring_keys(number);
      float s[kTiles][4];
      rows.fragments(s, rows.slopes, number, 1.f);
      Products<T>::accumulate(dq, s, rows.chunk, l.row_pitch, D, rows.weights, lane);
    }
    if (p.grad_query.data)
      store_rows<T>(dq, scale, scale, p.grad_query, rows.b, rows.h, rows.first_row + rows.warp_row, length, D, lane);
    __syncthreads();
    if (p.grad_key.data)
      transposed_product<Width / 8>(
          rows, rows.query, l.row_pitch, D, [&](int i, int j) { return plane_at(rows.slopes, i, j); },
          [&](int j, int d, float x) {
            if (!first) x += key_sums[j * D + d];
            if (!last) key_sums[j * D + d] = x;
            else
              static_cast<T*>(p.grad_key.data)[rows.b * p.grad_key.stride[0] + rows.h * p.grad_key.stride[1] +
                                               j * p.grad_key.stride[2] + d] = from_float<T>(x * scale);
          });
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kMaxWarps) gate_sum_kernel(GRID_CONSTANT(MapGatedCall, call)) {
  const int64_t size = call.c.p.Lk * call.c.p.Lk;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= 2 * size) return;
  const int which = index >= size;
  const View& grad = call.grad_gate[which];
  if (!grad.data) return;
  float sum = 0.f;
  for (int part = 0; part < call.blocks; ++part) sum += call.gate_parts[part * 2 * size + index];
  store_mask_value(grad, index - which * size, sum);
}

}  // namespace

template <class T, int Width>
const char* launch_map_gated_backward(const MapGatedCall& call, void* stream) {
  const char* error = launch(map_gated_backward_kernel<T, Width>, call.blocks, 32 * call.layout.warps,
                             call.layout.bytes, call, stream);
  if (error || !call.gate_parts) return error;
  constexpr int kThreads = 32 * kMaxWarps;
  const int64_t elements = 2 * call.c.p.Lk * call.c.p.Lk;
  return launch(gate_sum_kernel<T>, static_cast<int>((elements + kThreads - 1) / kThreads), kThreads, 0, call, stream);
}

}  // namespace cuda
}  // namespace lam
