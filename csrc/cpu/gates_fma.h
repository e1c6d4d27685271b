// The products of GateAtt with its gates in fused multiply-adds of the kernel's number type.
#pragma once
#include <cstdint>

#include "arena.h"
#include "gemm.h"
#include "rows.h"

namespace lam {
namespace {

template <class V>
class FmaGates {
 public:
  using T = typename V::T;

  // W^g and -W^l of a call as panels (gemm.h), and where wanted their transposes.
  struct Staged {
    T *whole, *near, *whole_t = nullptr, *near_t = nullptr;

    Staged(const MapGatedAttentionParams& p, bool transposed, Arena& arena) {
      const int64_t elements = panel_elements<V>(p.Lk, p.Lk);
      T* const rows = arena.take<T>(V::W * round_up(p.Lk, V::W));
      whole = arena.take<T>(elements);
      near = arena.take<T>(elements);
      if (transposed) whole_t = arena.take<T>(elements), near_t = arena.take<T>(elements);
      if (arena.base == nullptr) return;
      stage(p.gate_global, p.Lk, T(1), rows, whole, whole_t);
      stage(p.gate_local, p.Lk, T(-1), rows, near, near_t);
    }

   private:
    static void stage(const View& gate, int64_t T_, T factor, T* rows, T* panels, T* transposed) {
      constexpr int64_t W = V::W;
      const int64_t ld = round_up(T_, W);
      for (int64_t r0 = 0; r0 < T_; r0 += W) {
        const int64_t count = min64(W, T_ - r0);
        for (int64_t r = 0; r < count; ++r) {
          T* row = rows + r * ld;
          load_row<V>(row, at(gate, (r0 + r) * gate.stride[2]), gate.dtype, gate.stride[3], T_);
          for (int64_t c = T_; c < ld; ++c) row[c] = T(0);
          for (int64_t c = 0; c < ld; c += W) {
            const typename V::reg word = V::mul(V::set1(factor), V::load(row + c));
            V::store(row + c, word);
            V::store(panels + c * T_ + (r0 + r) * W, word);
          }
        }
        if (transposed != nullptr) pack_transposed<V>(Rows<T>{rows, ld}, count, T_, transposed + r0 * T_);
      }
    }
  };

  // Elements of the sum of one gate's gradient.
  static int64_t sum_elements(int64_t T_) { return T_ * sum_ld(T_); }

  // grad[i, :] = factor * the copies' sums, for the kRowsStored rows i from `row` * kRowsStored on
  static constexpr int64_t kRowsStored = 1;
  static void store_sums(const View& grad, T factor, int64_t T_, int64_t row, T* sums, int64_t copies, int64_t step) {
    const int64_t ld = sum_ld(T_);
    T* sum = sums + row * ld;
    for (int64_t n = 1; n < copies; ++n)
      for (int64_t c = 0; c < ld; c += V::W) V::store(sum + c, V::add(V::load(sum + c), V::load(sum + n * step + c)));
    store_row<T>(at_mutable(grad, row * T_), grad.dtype, 1, sum, factor, T_);
  }

  FmaGates(const MapGatedAttentionParams& p, const Staged& staged, int64_t, bool, Arena&)
      : T_(p.Lk), panel_(p.Lk * V::W), staged_(staged) {}

  void open_head() {}

  // Rows [r0, r0 + rows): U = A^g W^g
  void whole_logit(int64_t, int64_t rows, const T* whole, T* logit, int64_t ld) const {
    gemm<V, false, false, true>(rows, T_, T_, whole, ld, staged_.whole, panel_, logit, ld);
  }
  // U -= A^l W^l of rows whose local map is in columns [lo, lo + cols)
  void add_near_logit(int64_t, int64_t rows, int64_t lo, int64_t cols, const T* near, int64_t near_ld, T* logit,
                      int64_t ld) const {
    gemm<V, false, true, true>(rows, T_, cols, near, near_ld, staged_.near + lo * V::W, panel_, logit, ld);
  }

  // dU of rows [r0, r0 + rows), which the following are called with.
  void take_logit_grads(int64_t, int64_t, const T* grad, int64_t ld) { grad_ = grad, ld_ = ld; }
  // dW^g += A^g^T dU
  void sum_whole(int64_t rows, const T* whole, int64_t ld, T* sum) const {
    gemm<V, true, true>(T_, round_up(T_, V::W), rows, whole, ld, grad_, ld_, sum, sum_ld(T_));
  }
  // -dW^l += A^l^T dU of rows [s, s + rows) of those taken
  void sum_near(int64_t s, int64_t rows, int64_t lo, int64_t cols, const T* near, int64_t near_ld, T* sum) const {
    gemm<V, true, true>(cols, round_up(T_, V::W), rows, near, near_ld, grad_ + s * ld_, ld_, sum + lo * sum_ld(T_), sum_ld(T_));
  }
  // dA^g += dU W^g^T
  void add_whole_grad(int64_t rows, T* grad, int64_t ld) const {
    gemm<V, false, true, true>(rows, T_, T_, grad_, ld_, staged_.whole_t, panel_, grad, ld);
  }
  // dA^l -= dU W^l^T of rows [s, s + rows) of those taken and columns [lo, lo + cols)
  void add_near_grad(int64_t s, int64_t rows, int64_t lo, int64_t cols, T* grad, int64_t ld) const {
    gemm<V, false, true, true>(rows, cols, T_, grad_ + s * ld_, ld_, staged_.near_t + lo * T_, panel_, grad, ld);
  }
  void close_head(T*, T*) {}

 private:
  static int64_t sum_ld(int64_t T_) { return round_up(T_, V::W) + V::W; }  // never a power of two

  int64_t T_, panel_;  // panels of a gate: elements apart
  const Staged& staged_;
  const T* grad_ = nullptr;
  int64_t ld_ = 0;
};

}  // namespace
}  // namespace lam
