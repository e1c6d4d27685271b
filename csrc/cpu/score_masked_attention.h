// score_masked_attention on the CPU: the mask is a small network applied to each score row. Formulas:
// python_ref/score_masked_attention.py.
//
// A block of query rows is worked on whole: its score rows (of every head, when the network reads their mean) and all
// activations of the network lie in the second-level cache, never more. The backward pass computes the block's
// activations again and keeps them there until they are used. The parameters' gradient is summed in one copy a task,
// with tasks fixed by the number of threads, and the copies in their order: it repeats bit for bit.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "arena.h"
#include "gemm.h"
#include "products_fma.h"
#include "rows.h"
#include "schedule.h"
#include "softmax.h"
#include "tasks.h"
#include "visibility.h"

namespace lam {
namespace {

// What happens to a product before it is stored: nothing, negative numbers become 0, or it becomes 0 where `open` is 0.
enum class After { nothing, relu, gate };

template <class V, int MR, int NR, After kAfter>
__attribute__((always_inline)) inline void linear_registers(int64_t K, const typename V::T* __restrict x, int64_t ldx,
                                                            const typename V::T* __restrict w, int64_t ldw,
                                                            const typename V::T* __restrict bias,
                                                            const typename V::T* __restrict open, int64_t ldo,
                                                            typename V::T* __restrict y, int64_t ldy) {
  typename V::reg c[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) c[m][n] = bias == nullptr ? V::zero() : V::load(bias + n * V::W);
  for (int64_t k = 0; k < K; ++k) {
    typename V::reg b[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) b[n] = V::load(w + k * ldw + n * V::W);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const typename V::reg a = V::set1(x[m * ldx + k]);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) c[m][n] = V::fma(a, b[n], c[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      typename V::reg out = c[m][n];
      // max of its second operand and NaN is NaN
      if constexpr (kAfter == After::relu) out = V::max(V::zero(), out);
      if constexpr (kAfter == After::gate) out = V::keep(V::not_equal(V::load(open + m * ldo + n * V::W), 0), out);
      V::store(y + m * ldy + n * V::W, out);
    }
}

template <class V, int MR, int NR, After kAfter>
void linear_rows(int64_t rows, int64_t K, const typename V::T* x, int64_t ldx, const typename V::T* w, int64_t ldw,
                 const typename V::T* bias, const typename V::T* open, int64_t ldo, typename V::T* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + MR <= rows; m += MR)
    linear_registers<V, MR, NR, kAfter>(K, x + m * ldx, ldx, w, ldw, bias, open + m * ldo, ldo, y + m * ldy, ldy);
  if constexpr (MR > 1)
    if (m < rows)
      linear_rows<V, MR / 2, NR, kAfter>(rows - m, K, x + m * ldx, ldx, w, ldw, bias, open + m * ldo, ldo, y + m * ldy, ldy);
}

template <class V, int NR, After kAfter>
void linear_columns(int64_t words, int64_t rows, int64_t K, const typename V::T* x, int64_t ldx, const typename V::T* w,
                    int64_t ldw, const typename V::T* bias, const typename V::T* open, int64_t ldo, typename V::T* y,
                    int64_t ldy) {
  if constexpr (NR > 0) {
    constexpr int kRows = 2 * NR <= V::kCols ? 2 * V::kRows : V::kRows;  // as many sums as fit in registers
    if (words == NR) linear_rows<V, kRows, NR, kAfter>(rows, K, x, ldx, w, ldw, bias, open, ldo, y, ldy);
    else linear_columns<V, NR - 1, kAfter>(words, rows, K, x, ldx, w, ldw, bias, open, ldo, y, ldy);
  }
}

// y [rows, words] = x [rows, K] w [K, words] + bias; x and y must not overlap. bias may be null.
template <class V, After kAfter>
void linear(int64_t rows, int64_t words, int64_t K, const typename V::T* x, int64_t ldx, const typename V::T* w,
            int64_t ldw, const typename V::T* bias, const typename V::T* open, int64_t ldo, typename V::T* y, int64_t ldy) {
  for (int64_t n = 0; n < words; n += V::kCols) {
    const int64_t at = n * V::W;
    linear_columns<V, V::kCols, kAfter>(min64(V::kCols, words - n), rows, K, x, ldx, w + at, ldw,
                                        bias == nullptr ? nullptr : bias + at,
                                        kAfter == After::gate ? open + at : x, kAfter == After::gate ? ldo : 0, y + at, ldy);
  }
}

template <class V>
class ScoreMask {
 public:
  using T = typename V::T;

  static int forward(const ScoreMaskedAttentionParams& p) {
    const Sizes s(p, false);
    const int64_t blocks = ceil_div(p.Lq, s.rows);
    const int64_t parts = s.units >= 2 * p.num_threads ? 1 : min64(blocks, ceil_div(2 * p.num_threads, s.units));
    return run(p, s, s.units * parts, [&](ScoreMask& mask, int64_t task, T*) {
      const Part rows{task % parts, parts};
      mask.attend(task / parts, rows.begin(blocks), rows.end(blocks));
    });
  }

  static int backward(const ScoreMaskedAttentionParams& p) {
    const Sizes s(p, true);
    const int64_t parts = min64(p.num_threads, s.units);
    return run(p, s, parts, [&](ScoreMask& mask, int64_t part, T* sums) {
      const Part mine{part, parts};
      for (int64_t unit = mine.begin(s.units); unit < mine.end(s.units); ++unit) mask.differentiate(unit, sums);
    });
  }

 private:
  // A unit is the heads whose score rows the network reads together: one, or all of a sample.
  struct Sizes {
    bool backward;
    int64_t heads, units;
    int64_t keys, depth, width;  // padded to whole words
    int64_t widest = 0, activations = 0, parameters = 0;  // of a row; of the padded layers
    int64_t rows;                // of a block

    Sizes(const ScoreMaskedAttentionParams& p, bool backward_in) : backward(backward_in) {
      heads = p.mean ? p.H : 1;
      units = p.B * p.H / heads;
      keys = round_up(p.Lk, V::W), depth = round_up(p.D, V::W), width = round_up(p.Dv, V::W);
      for (int64_t l = 0; l <= p.layers; ++l) {
        const int64_t w = round_up(p.widths[l], V::W);
        widest = max64(widest, w);
        if (l < p.layers) activations += w;
        if (l > 0) parameters += (p.widths[l - 1] + 1) * w;
      }
      constexpr int64_t kBlockBytes = 640 * 1024, kMostRows = 96, kLeastRows = 2 * V::kRows;
      const int64_t row = (backward ? activations : 2 * widest) + 2 * widest + (2 * heads + 4) * keys + depth + width;
      rows = max64(kLeastRows, min64(kMostRows, kBlockBytes / (row * static_cast<int64_t>(sizeof(T)))));
      rows = min64(rows / kLeastRows * kLeastRows, p.Lq);
      rows = ceil_div(p.Lq, ceil_div(p.Lq, rows));
    }
  };

  // One layer in whole words: weight [in, ld], bias [ld], and for the backward pass the transpose [out, in_ld].
  struct Layer {
    int64_t in, out, ld, in_ld;
    const T *weight, *bias, *transposed;
    int64_t sums;    // where its weight's gradient starts in a copy; the bias' follows
    int64_t before;  // elements a row of the inputs of the layers before it
  };

  template <class Body>
  static int run(const ScoreMaskedAttentionParams& p, const Sizes& s, int64_t tasks, const Body& body) {
    const bool sums_wanted = s.backward && p.grad_parameters != nullptr;
    int64_t transposed = 0;
    for (int64_t l = 0; s.backward && l < p.layers; ++l) transposed += p.widths[l + 1] * round_up(p.widths[l], V::W);
    const int64_t copy = round_up(s.parameters, V::W);
    ScratchBlock shared((copy + transposed + (sums_wanted ? tasks * copy : 0)) * static_cast<int64_t>(sizeof(T)));
    Arena count;
    { ScoreMask counted(p, s, nullptr, count); }
    ScratchBlock block(count.used * p.num_threads);
    if (shared.data == nullptr || block.data == nullptr) return 1;
    T* const staged = static_cast<T*>(shared.data);
    T* const sums = sums_wanted ? staged + copy + transposed : nullptr;
    Layer layers[kMaxScoreLayers];
    stage_layers(p, s.backward, layers, staged, staged + copy);
    run_tasks(p, tasks, [&](int64_t worker, int64_t task) {
      Arena arena{static_cast<char*>(block.data) + worker * count.used};
      ScoreMask mask(p, s, layers, arena);
      T* own = sums == nullptr ? nullptr : sums + task * copy;
      if (own != nullptr) memset(own, 0, static_cast<size_t>(copy) * sizeof(T));
      body(mask, task, own);
    });
    if (sums != nullptr) finish_parameters(p, layers, sums, copy, tasks);
    return 0;
  }

  static void stage_layers(const ScoreMaskedAttentionParams& p, bool backward, Layer* layers, T* staged, T* transposed) {
    const T* source = static_cast<const T*>(p.parameters);
    int64_t sums = 0, before = 0;
    for (int64_t l = 0; l < p.layers; ++l) {
      Layer& layer = layers[l];
      layer = {p.widths[l], p.widths[l + 1], round_up(p.widths[l + 1], V::W), round_up(p.widths[l], V::W),
               staged,      nullptr,         nullptr,                         sums,
               before};
      sums += (layer.in + 1) * layer.ld;
      before += layer.in_ld;
      for (int64_t r = 0; r <= layer.in; ++r, staged += layer.ld, source += layer.out) {
        memcpy(staged, source, static_cast<size_t>(layer.out) * sizeof(T));
        for (int64_t c = layer.out; c < layer.ld; ++c) staged[c] = T(0);
      }
      layer.bias = staged - layer.ld;
      if (!backward) continue;
      layer.transposed = transposed;
      for (int64_t c = 0; c < layer.out; ++c, transposed += layer.in_ld)
        for (int64_t r = 0; r < layer.in_ld; ++r) transposed[r] = r < layer.in ? layer.weight[r * layer.ld + c] : T(0);
    }
  }

  static void finish_parameters(const ScoreMaskedAttentionParams& p, const Layer* layers, T* sums, int64_t copy,
                                int64_t tasks) {
    T* to = static_cast<T*>(p.grad_parameters);
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t k = 0; k < copy; ++k) sums[k] += sums[task * copy + k];
    for (int64_t l = 0; l < p.layers; ++l)
      for (int64_t r = 0; r <= layers[l].in; ++r, to += layers[l].out)
        memcpy(to, sums + layers[l].sums + r * layers[l].ld, static_cast<size_t>(layers[l].out) * sizeof(T));
  }

  ScoreMask(const ScoreMaskedAttentionParams& p, const Sizes& s, const Layer* layers, Arena& arena)
      : p_(p), s_(s), layers_(layers) {
    const bool staged = !in_place<V>(p.query.dtype);
    key_panels_ = arena.take<T>(panel_elements<V>(s.keys, p.D));
    value_panels_ = arena.take<T>(s.backward ? panel_elements<V>(s.keys, p.Dv) : 0);
    key_buffer_ = arena.take<T>(staged ? p.Lk * s.depth : 0);
    value_buffer_ = arena.take<T>(staged ? p.Lk * s.width : 0);
    query_buffer_ = arena.take<T>(staged ? s.rows * s.depth : 0);
    grad_out_buffer_ = arena.take<T>(staged && s.backward ? s.rows * s.width : 0);
    row_buffer_ = arena.take<T>(s.rows * max64(s.depth, s.width));
    scores_ = arena.take<T>(s.heads * s.rows * s.keys);
    weights_ = arena.take<T>(s.rows * s.keys);
    // the first activation is the network's input, so the scores of one head are it
    activations_ = arena.take<T>(s.rows * (s.backward ? s.activations : 2 * s.widest));
    mask_ = arena.take<T>(s.rows * s.keys);
    if (s.backward) {
      weight_grads_ = arena.take<T>(s.rows * s.keys);
      score_grads_ = arena.take<T>(s.heads * s.rows * s.keys);
      slopes_[0] = arena.take<T>(s.rows * s.widest);
      slopes_[1] = arena.take<T>(s.rows * s.widest);
      key_sum_ = arena.take<T>(staged ? s.heads * p.Lk * s.depth : 0);
      value_sum_ = arena.take<T>(staged ? s.heads * p.Lk * s.width : 0);
    }
  }

  int64_t batch(int64_t unit) const { return unit * s_.heads / p_.H; }
  int64_t head(int64_t unit, int64_t n) const { return unit * s_.heads % p_.H + n; }

  void enter_batch(int64_t b) {
    for (int64_t w = 0; w < 2; ++w) {
      const int64_t n = max64(0, min64(64, p_.Lk - w * 64));
      visible_[w] = low_bits(n);
      if (p_.key_mask.data == nullptr || n == 0) continue;
      const int64_t* stride = p_.key_mask.stride;
      const uint8_t* keys = static_cast<const uint8_t*>(p_.key_mask.data) + b * stride[0] + w * 64 * stride[3];
      visible_[w] = bits_of_bytes(keys, stride[3], n);
    }
  }
  typename V::mask visible(int64_t c) const { return lanes_visible<V>(visible_, c); }

  Rows<T> stage(const View& v, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width, T* buffer) const {
    return stage_rows<V>(at(v, head_offset(v, b, h) + first * v.stride[2]), v.dtype, v.stride[2], count, width, buffer);
  }
  void enter_keys(int64_t b, int64_t h, bool values_too) {
    key_ = stage(p_.key, b, h, 0, p_.Lk, p_.D, key_buffer_);
    pack_transposed<V>(key_, p_.Lk, p_.D, key_panels_);
    if (!values_too) return;
    value_ = stage(p_.value, b, h, 0, p_.Lk, p_.Dv, value_buffer_);
    if (s_.backward) pack_transposed<V>(value_, p_.Lk, p_.Dv, value_panels_);
  }
  void multiply_panels(int64_t rows, int64_t depth, Rows<T> x, const T* panels, T* to) const {
    gemm<V, false, false, true>(rows, s_.keys, depth, x.data, x.ld, panels, depth * V::W, to, s_.keys);
  }

  // Scores of the unit's heads, and the network's input and output for `rows` rows from i0 on.
  void build_mask(int64_t unit, int64_t i0, int64_t rows) {
    const int64_t b = batch(unit);
    const typename V::reg scale = V::set1(static_cast<T>(p_.scale));
    const typename V::reg share = V::set1(T(1) / static_cast<T>(s_.heads));
    T* input = activations_;
    const int64_t input_ld = layers_[0].in_ld;
    for (int64_t n = 0; n < s_.heads; ++n) {
      const int64_t h = head(unit, n);
      if (s_.heads > 1) enter_keys(b, h, false);
      T* scores = scores_ + n * s_.rows * s_.keys;
      multiply_panels(rows, p_.D, stage(p_.query, b, h, i0, rows, p_.D, query_buffer_), key_panels_, scores);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < s_.keys; c += V::W) {
          T *s = scores + r * s_.keys + c, *x = input + r * input_ld + c;
          const typename V::reg y = V::mul(V::load(s), scale);
          V::store(s, y);
          typename V::reg mean = s_.heads > 1 ? V::mul(y, share) : y;
          if (n > 0) mean = V::add(mean, V::load(x));
          V::store(x, n + 1 == s_.heads ? V::keep(visible(c), mean) : mean);
        }
    }
    const T* x = input;
    for (int64_t l = 0; l < p_.layers; ++l) {
      const Layer& layer = layers_[l];
      const bool last = l + 1 == p_.layers;
      // the forward pass keeps two activations, the backward pass all
      T* y = last ? mask_ : s_.backward ? activation(l + 1) : activations_ + (l + 1) % 2 * s_.rows * s_.widest;
      if (last) linear<V, After::nothing>(rows, layer.ld / V::W, layer.in, x, layer.in_ld, layer.weight, layer.ld, layer.bias, nullptr, 0, y, layer.ld);
      else linear<V, After::relu>(rows, layer.ld / V::W, layer.in, x, layer.in_ld, layer.weight, layer.ld, layer.bias, nullptr, 0, y, layer.ld);
      x = y;
    }
  }
  // Input of layer l in the backward pass.
  T* activation(int64_t l) const { return activations_ + layers_[l].before * s_.rows; }

  // weights_ = softmax of the fused scores of one head
  void softmax(int64_t rows, const T* scores) const {
    const typename V::reg hidden = V::set1(-kInfinity<T>), log2e = V::set1(kLog2e<T>);
    for (int64_t r = 0; r < rows; ++r) {
      const T *s = scores + r * s_.keys, *m = mask_ + r * s_.keys;
      T* w = weights_ + r * s_.keys;
      typename V::reg most = hidden;
      for (int64_t c = 0; c < s_.keys; c += V::W) {
        const typename V::reg x = V::load(s + c), y = V::load(m + c);
        const typename V::reg z = V::select(visible(c), p_.multiply ? V::mul(x, y) : V::add(x, y), hidden);
        most = V::max(most, z);
        V::store(w + c, z);
      }
      const T largest = V::reduce_max(most);
      const typename V::reg shift = V::set1(largest == -kInfinity<T> ? T(0) : largest);
      typename V::reg total = V::zero();
      for (int64_t c = 0; c < s_.keys; c += V::W) {
        const typename V::reg e = V::exp2(V::mul(V::sub(V::load(w + c), shift), log2e));
        total = V::add(total, e);
        V::store(w + c, e);
      }
      const T sum = V::reduce_add(total);
      const typename V::reg factor = V::set1(sum == T(0) ? T(0) : T(1) / sum);
      for (int64_t c = 0; c < s_.keys; c += V::W) V::store(w + c, V::mul(V::load(w + c), factor));
    }
  }

  void attend(int64_t unit, int64_t first_block, int64_t last_block) {
    const int64_t b = batch(unit);
    enter_batch(b);
    if (s_.heads == 1) enter_keys(b, head(unit, 0), true);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t i0 = block * s_.rows, rows = min64(s_.rows, p_.Lq - i0);
      build_mask(unit, i0, rows);
      for (int64_t n = 0; n < s_.heads; ++n) {
        const int64_t h = head(unit, n);
        if (s_.heads > 1) value_ = stage(p_.value, b, h, 0, p_.Lk, p_.Dv, value_buffer_);
        softmax(rows, scores_ + n * s_.rows * s_.keys);
        store_rows(p_.out, b, h, i0, rows, p_.Dv, s_.width, [&](T* to, int64_t ld) {
          gemm<V, false, false>(rows, p_.Dv, p_.Lk, weights_, s_.keys, value_.data, value_.ld, to, ld);
        });
      }
    }
  }

  // Lets `write` fill rows of a result, in place or by way of a buffer.
  template <class Write>
  void store_rows(const View& v, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t width, int64_t ld, const Write& write) const {
    char* const first = at_mutable(v, head_offset(v, b, h) + i0 * v.stride[2]);
    if (in_place<V>(v.dtype)) return write(reinterpret_cast<T*>(first), v.stride[2]);
    write(row_buffer_, ld);
    for (int64_t r = 0; r < rows; ++r)
      store_words<V>(first + r * v.stride[2] * size_of(v.dtype), v.dtype, row_buffer_ + r * ld, width);
  }

  // Where the gradient of a head's keys or values is summed over the blocks.
  Rows<T> sum_rows(const View& v, int64_t b, int64_t h, int64_t n, int64_t width, int64_t ld, T* sums) const {
    if (v.data == nullptr) return {};
    if (in_place<V>(v.dtype)) return {reinterpret_cast<T*>(at_mutable(v, head_offset(v, b, h))), v.stride[2]};
    return {sums + n * p_.Lk * ld, ld};
  }
  void finish_sums(const View& v, Rows<T> sums, int64_t b, int64_t h, int64_t width) const {
    if (v.data == nullptr || in_place<V>(v.dtype)) return;
    for (int64_t r = 0; r < p_.Lk; ++r)
      store_words<V>(at_mutable(v, head_offset(v, b, h) + r * v.stride[2]), v.dtype, sums.data + r * sums.ld, width);
  }
  static void add_product(bool first, int64_t M, int64_t cols, int64_t K, const T* A, int64_t lda, Rows<T> B, Rows<T> to) {
    if (to.data == nullptr) return;
    if (first) gemm<V, true, false>(M, cols, K, A, lda, B.data, B.ld, to.data, to.ld);
    else gemm<V, true, true>(M, cols, K, A, lda, B.data, B.ld, to.data, to.ld);
  }
  Rows<T> key_sums(int64_t b, int64_t h, int64_t n) const {
    return sum_rows(p_.grad_key, b, h, n, p_.D, s_.depth, key_sum_);
  }
  Rows<T> value_sums(int64_t b, int64_t h, int64_t n) const {
    return sum_rows(p_.grad_value, b, h, n, p_.Dv, s_.width, value_sum_);
  }

  void differentiate(int64_t unit, T* sums) {
    const int64_t b = batch(unit);
    enter_batch(b);
    if (s_.heads == 1) enter_keys(b, head(unit, 0), true);
    for (int64_t i0 = 0; i0 < p_.Lq; i0 += s_.rows) {
      const int64_t rows = min64(s_.rows, p_.Lq - i0);
      build_mask(unit, i0, rows);
      for (int64_t n = 0; n < s_.heads; ++n) {
        const int64_t h = head(unit, n);
        if (s_.heads > 1) enter_keys(b, h, true);
        softmax(rows, scores_ + n * s_.rows * s_.keys);
        const Rows<T> grad_out = stage(p_.grad_out, b, h, i0, rows, p_.Dv, grad_out_buffer_);
        add_product(i0 == 0, p_.Lk, p_.Dv, rows, weights_, s_.keys, grad_out, value_sums(b, h, n));
        multiply_panels(rows, p_.Dv, grad_out, value_panels_, weight_grads_);
        softmax_backward(rows, n);
      }
      const T* input_grad = differentiate_network(rows, sums);
      for (int64_t n = 0; n < s_.heads; ++n) {
        const int64_t h = head(unit, n);
        T* ds = score_grads_ + n * s_.rows * s_.keys;
        add_input_grad(rows, input_grad, ds);
        if (p_.grad_query.data != nullptr) {
          if (s_.heads > 1) key_ = stage(p_.key, b, h, 0, p_.Lk, p_.D, key_buffer_);
          store_rows(p_.grad_query, b, h, i0, rows, p_.D, s_.depth, [&](T* to, int64_t ld) {
            gemm<V, false, false>(rows, p_.D, p_.Lk, ds, s_.keys, key_.data, key_.ld, to, ld);
          });
        }
        if (p_.grad_key.data != nullptr)
          add_product(i0 == 0, p_.Lk, p_.D, rows, ds, s_.keys,
                      stage(p_.query, b, h, i0, rows, p_.D, query_buffer_), key_sums(b, h, n));
      }
    }
    for (int64_t n = 0; n < s_.heads; ++n) {
      const int64_t h = head(unit, n);
      finish_sums(p_.grad_key, key_sums(b, h, n), b, h, p_.D);
      finish_sums(p_.grad_value, value_sums(b, h, n), b, h, p_.Dv);
    }
  }

  // Head n of the unit: its part of the mask's gradient, into slopes_[0], and of that of its scores by way of the fusion.
  void softmax_backward(int64_t rows, int64_t n) const {
    const int64_t ld = layers_[p_.layers - 1].ld;
    for (int64_t r = 0; r < rows; ++r) {
      const T *w = weights_ + r * s_.keys, *g = weight_grads_ + r * s_.keys, *m = mask_ + r * s_.keys;
      const T* s = scores_ + (n * s_.rows + r) * s_.keys;
      T *ds = score_grads_ + (n * s_.rows + r) * s_.keys, *dm = slopes_[0] + r * ld;
      typename V::reg sum = V::zero();
      for (int64_t c = 0; c < s_.keys; c += V::W) sum = V::fma(V::load(w + c), V::load(g + c), sum);
      const typename V::reg delta = V::set1(V::reduce_add(sum));
      for (int64_t c = 0; c < s_.keys; c += V::W) {
        const typename V::reg dz = V::mul(V::load(w + c), V::sub(V::load(g + c), delta));
        V::store(ds + c, p_.multiply ? V::keep(visible(c), V::mul(dz, V::load(m + c))) : dz);
        typename V::reg slope = p_.multiply ? V::mul(dz, V::load(s + c)) : dz;
        if (n > 0) slope = V::add(slope, V::load(dm + c));
        V::store(dm + c, V::keep(visible(c), slope));
      }
    }
  }

  // From slopes_[0], the gradient of the network's output: adds to its parameters' gradients, returns its input's.
  const T* differentiate_network(int64_t rows, T* sums) {
    const bool scores_wanted = p_.grad_query.data != nullptr || p_.grad_key.data != nullptr;
    for (int64_t l = p_.layers; l-- > 0;) {
      const Layer& layer = layers_[l];
      const T *x = activation(l), *dy = slopes_[(p_.layers - 1 - l) % 2];
      if (sums != nullptr) {
        T* dw = sums + layer.sums;
        gemm<V, true, true>(layer.in, layer.ld, rows, x, layer.in_ld, dy, layer.ld, dw, layer.ld);
        T* db = dw + layer.in * layer.ld;
        for (int64_t c = 0; c < layer.ld; c += V::W) {
          typename V::reg total = V::load(db + c);
          for (int64_t r = 0; r < rows; ++r) total = V::add(total, V::load(dy + r * layer.ld + c));
          V::store(db + c, total);
        }
      }
      T* dx = slopes_[(p_.layers - l) % 2];
      if (l > 0) linear<V, After::gate>(rows, layer.in_ld / V::W, layer.out, dy, layer.ld, layer.transposed, layer.in_ld, nullptr, x, layer.in_ld, dx, layer.in_ld);
      else if (scores_wanted) linear<V, After::nothing>(rows, layer.in_ld / V::W, layer.out, dy, layer.ld, layer.transposed, layer.in_ld, nullptr, nullptr, 0, dx, layer.in_ld);
    }
    return slopes_[p_.layers % 2];
  }

  void add_input_grad(int64_t rows, const T* input_grad, T* ds) const {
    if (p_.grad_query.data == nullptr && p_.grad_key.data == nullptr) return;
    const typename V::reg scale = V::set1(static_cast<T>(p_.scale));
    const typename V::reg share = V::set1(T(1) / static_cast<T>(s_.heads));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < s_.keys; c += V::W) {
        T* at = ds + r * s_.keys + c;
        const typename V::reg input = V::keep(visible(c), V::load(input_grad + r * layers_[0].in_ld + c));
        V::store(at, V::mul(V::fma(input, share, V::load(at)), scale));
      }
  }

  const ScoreMaskedAttentionParams& p_;
  const Sizes& s_;
  const Layer* layers_;
  uint64_t visible_[2] = {0, 0};
  Rows<T> key_, value_;
  T *key_panels_, *value_panels_, *key_buffer_, *value_buffer_, *query_buffer_, *grad_out_buffer_, *row_buffer_;
  T *scores_, *weights_, *activations_, *mask_;
  T *weight_grads_ = nullptr, *score_grads_ = nullptr, *slopes_[2] = {nullptr, nullptr};
  T *key_sum_ = nullptr, *value_sum_ = nullptr;
};

}  // namespace
}  // namespace lam
