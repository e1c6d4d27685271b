// Rows of both maps of map_gated_attention on chip: a block owns 16 rows a warp of one (batch, head) pair and holds planes
// of its rows x all keys in fp32. A lane always meets the same elements of a plane, so that only products need barriers.
#pragma once
#include "cuda/map_gated_attention.h"
#include "cuda/softmax.cuh"

namespace lam {
namespace cuda {
namespace {

__device__ __forceinline__ float mixed(float r, float whole, float near) { return r * whole + (1 - r) * near; }

template <class T>
struct MapRows {
  const MapGatedCall& call;
  const MaskedAttentionParams& p;
  const MapGateLayout& l;
  Threads threads;
  Lane lane;
  int length, chunks, words, warp_row, row;
  int b, h, first_row;
  T *query, *grad_out, *chunk, *gate;
  float *whole, *near, *gates, *slopes, *inverse, *weights;
  uint32_t *visible, *keys;

  __device__ __forceinline__ MapRows(const MapGatedCall& given, unsigned char* memory)
      : call(given),
        p(given.c.p),
        l(given.layout),
        lane(threads.id),
        length(static_cast<int>(p.Lk)),
        chunks((length + kChunk - 1) / kChunk),
        words(2 * chunks),
        warp_row(16 * threads.warp),
        row(warp_row + lane.row),
        query(at<T>(memory, l.query)),
        grad_out(at<T>(memory, l.grad_out)),
        chunk(at<T>(memory, l.chunk)),
        gate(at<T>(memory, l.gate)),
        whole(at<float>(memory, l.whole)),
        near(at<float>(memory, l.near)),
        gates(at<float>(memory, l.gates)),
        slopes(at<float>(memory, l.slopes)),
        inverse(at<float>(memory, l.inverse)),
        weights(l.weights < 0 ? nullptr : at<float>(memory, l.weights) + warp_row * (kChunk + 4)),
        visible(at<uint32_t>(memory, l.visible)),
        keys(at<uint32_t>(memory, l.key_visible)) {}

  __device__ __forceinline__ int rows() const { return 16 * l.warps; }

  // ---- what comes on chip

  __device__ __forceinline__ void enter(int pair, int row_block) {
    const MaskedAttentionCall& c = call.c;
    b = pair / static_cast<int>(p.H), h = pair % static_cast<int>(p.H), first_row = row_block * rows();
    __syncthreads();
    copy_rows(query, l.row_pitch, p.query, c.query_aligned, b, h, first_row, rows(), length, static_cast<int>(p.D),
              threads);
    if (l.grad_out >= 0)
      copy_rows(grad_out, l.value_pitch, p.grad_out, c.grad_out_aligned, b, h, first_row, rows(), length,
                static_cast<int>(p.Dv), threads);
    load_visible(visible, c, b, h, first_row, rows(), 0, words, threads);
    load_key_visible(keys, c, b, 0, words, threads);
  }
  // 64 rows of key or value; the block waits for all that is under way.
  __device__ __forceinline__ void bring_chunk(const View& v, bool aligned, int pitch, int number, int64_t width) {
    __syncthreads();
    copy_rows(chunk, pitch, v, aligned, b, h, number * kChunk, kChunk, length, static_cast<int>(width), threads);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  __device__ __forceinline__ void bring_keys(int number) {
    bring_chunk(p.key, call.c.key_aligned, l.row_pitch, number, p.D);
  }
  __device__ __forceinline__ void bring_values(int number) {
    bring_chunk(p.value, call.c.value_aligned, l.value_pitch, number, p.Dv);
  }

  // ---- planes

  // f(place, half, n) for the lane's pairs of neighbours in a chunk
  template <class F>
  __device__ __forceinline__ void each_pair(int number, const F& f) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        f((row + 8 * half) * l.plane_pitch + number * kChunk + n * 8 + lane.column, half, n);
  }
  static __device__ __forceinline__ float2 get(const float* plane, int place) {
    return ptx::shared_load(reinterpret_cast<const float2*>(plane + place));
  }
  static __device__ __forceinline__ void put(float* plane, int place, float x, float y) {
    ptx::shared_store(reinterpret_cast<float2*>(plane + place), make_float2(x, y));
  }
  __device__ __forceinline__ void fragments(float (&s)[kTiles][4], const float* plane, int number, float sign) const {
    each_pair(number, [&](int place, int half, int n) {
      const float2 x = get(plane, place);
      s[n][2 * half] = sign * x.x, s[n][2 * half + 1] = sign * x.y;
    });
  }
  __device__ __forceinline__ void bits(const uint32_t* of_rows, int number, uint32_t (&out)[2][2]) const {
    bits_of_rows(of_rows, keys, words, row, 2 * number, lane.column, out);
  }

  // Both maps, from the scores.
  __device__ __forceinline__ void form_maps() {
    const float scale = static_cast<float>(p.scale);
    float most[2] = {-kInfinity, -kInfinity}, near_most[2] = {-kInfinity, -kInfinity};
    float sum[2] = {0.f, 0.f}, near_sum[2] = {0.f, 0.f};
#pragma unroll 1
    for (int number = 0; number < chunks; ++number) {
      bring_keys(number);
      uint32_t seen[2][2], local[2][2];
      bits(nullptr, number, seen);
      bits(visible, number, local);
      float s[kTiles][4];
      clear(s);
      Products<T>::scores(s, query + warp_row * l.row_pitch, l.row_pitch, chunk, l.row_pitch, static_cast<int>(p.D),
                          lane);
      each_pair(number, [&](int place, int half, int n) {
        put(whole, place, s[n][2 * half] * scale, s[n][2 * half + 1] * scale);
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          if (bit_of(seen, n, e)) most[half] = fmaxf(most[half], s[n][e] * scale);
          if (bit_of(local, n, e)) near_most[half] = fmaxf(near_most[half], s[n][e] * scale);
        }
      });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = max_of_row(most[half]), near_most[half] = max_of_row(near_most[half]);
    }
#pragma unroll 1
    for (int number = 0; number < chunks; ++number) {
      uint32_t seen[2][2], local[2][2];
      bits(nullptr, number, seen);
      bits(visible, number, local);
      each_pair(number, [&](int place, int half, int n) {
        const float2 z = get(whole, place);
        const float x[2] = {z.x, z.y};
        float weight[2], near_weight[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          weight[e] = bit_of(seen, n, 2 * half + e) ? exp_of_difference(x[e], most[half]) : 0.f;
          near_weight[e] = bit_of(local, n, 2 * half + e) ? exp_of_difference(x[e], near_most[half]) : 0.f;
          sum[half] += weight[e], near_sum[half] += near_weight[e];
        }
        put(whole, place, weight[0], weight[1]);
        put(near, place, near_weight[0], near_weight[1]);
      });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = reciprocal(sum_of_row(sum[half])), near_sum[half] = reciprocal(sum_of_row(near_sum[half]));
    }
#pragma unroll 1
    for (int number = 0; number < chunks; ++number)
      each_pair(number, [&](int place, int half, int) {
        const float2 x = get(whole, place), y = get(near, place);
        put(whole, place, x.x * sum[half], x.y * sum[half]);
        put(near, place, y.x * near_sum[half], y.y * near_sum[half]);
      });
  }
  static __device__ __forceinline__ float reciprocal(float x) { return x == 0.f ? 0.f : 1 / x; }

  // ---- products

  // u += sign * plane W, or W^T, for 64 columns of it. Only where the plane's pattern leaves something.
  __device__ __forceinline__ void times_gate(float (&u)[kTiles][4], const float* plane, float sign, bool of_pattern,
                                             const View& w, bool transposed, int number) {
    const int64_t down = w.stride[transposed ? 3 : 2], along = w.stride[transposed ? 2 : 3];
#pragma unroll 1
    for (int inner = 0; inner < chunks; ++inner) {
      __syncthreads();
      for (int k = threads.id; k < kChunk * kChunk; k += threads.count) {
        // neighbouring lanes read neighbouring numbers
        const int r = transposed ? k % kChunk : k / kChunk, c = transposed ? k / kChunk : k % kChunk;
        const int i = inner * kChunk + r, j = number * kChunk + c;
        const float value = i < length && j < length ? load_mask_value(w, i * down + j * along) : 0.f;
        gate[r * l.gate_pitch + c] = from_float<T>(value);
      }
      __syncthreads();
      uint32_t local[2][2];
      bits(of_pattern ? visible : nullptr, inner, local);
      if (!any_bit(local)) continue;
      float s[kTiles][4];
      fragments(s, plane, inner, sign);
      Products<T>::accumulate(u, s, gate, l.gate_pitch, kChunk, weights, lane);
    }
  }
  // R of 64 columns, as fragments.
  __device__ __forceinline__ void form_gate(float (&u)[kTiles][4], int number) {
    clear(u);
    times_gate(u, whole, 1.f, false, call.gate[0], false, number);
    times_gate(u, near, -1.f, true, call.gate[1], false, number);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) u[n][e] = 1 / (1 + exp_of_difference(0.f, u[n][e]));
  }
};

}  // namespace
}  // namespace cuda
}  // namespace lam
