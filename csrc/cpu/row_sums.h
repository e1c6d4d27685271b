// What the backward pass has to know of each row of a result before it meets the row's scores.
#pragma once
#include <cstdint>

#include "arena.h"
#include "products_fma.h"
#include "rows.h"
#include "softmax.h"
#include "visibility.h"

namespace lam {
namespace {

// Of each row: its lse, and rowsum(grad_out * out) - grad_lse.
template <class V>
class RowSums {
 public:
  using T = typename V::T;
  RowSums(const MaskedAttentionParams& p, int64_t rows, Arena& arena) : p_(p) {
    shift_ = arena.take<T>(rows);
    rest_ = arena.take<T>(rows);
    delta_ = arena.take<T>(rows);
  }
  RowSlopes<T> of(int64_t r) const { return {shift_ + r, rest_ + r, delta_ + r}; }  // of the rows from r on

  void enter(const Region& region, int64_t b, int64_t h) {
    const int64_t *ls = p_.lse.stride, *gs = p_.grad_lse.stride;
    for (int64_t r = 0; r < region.rows; ++r) {
      const int64_t i = region.i(r);
      const int64_t at_lse = head_offset(p_.lse, b, h) + i * ls[2];
      const T lse = static_cast<const T*>(p_.lse.data)[at_lse];
      shift_[r] = lse == -kInfinity<T> ? kInfinity<T> : lse;
      rest_[r] = p_.lse_rest.data == nullptr ? T(0) : static_cast<const T*>(p_.lse_rest.data)[at_lse];
      const char *out = row_of(p_.out, b, h, i), *grad_out = row_of(p_.grad_out, b, h, i);
      if (r + kAhead < region.rows) {  // rows of `out` were not met for long
        const char* next = row_of(p_.out, b, h, region.i(r + kAhead));
        for (int64_t at = 0; at < p_.Dv * size_of(p_.out.dtype); at += 64) __builtin_prefetch(next + at);
      }
      const DType out_type = p_.out.dtype, grad_type = p_.grad_out.dtype;
      typename V::reg sum = V::zero();
      int64_t d = 0;
      for (; d + V::W <= p_.Dv; d += V::W)
        sum = V::fma(load_word<V>(out + d * size_of(out_type), out_type),
                     load_word<V>(grad_out + d * size_of(grad_type), grad_type), sum);
      if (d < p_.Dv) sum = V::fma(rest_of_row(out, out_type, d), rest_of_row(grad_out, grad_type, d), sum);
      delta_[r] = V::reduce_add(sum);
      if (p_.grad_lse.data != nullptr)
        delta_[r] -= load_scalar<T>(at(p_.grad_lse, head_offset(p_.grad_lse, b, h) + i * gs[2]), p_.grad_lse.dtype);
    }
  }

 private:
  static constexpr int64_t kAhead = 16;

  // Elements from d on, fewer than a word, in lanes of their own: those of the row's last word, which begins before them.
  typename V::reg rest_of_row(const char* row, DType type, int64_t d) const {
    if (p_.Dv < V::W) {
      alignas(64) T word[V::W];
      V::store(word, V::zero());
      load_row<V>(word, row, type, 1, p_.Dv);
      return V::load(word);
    }
    const uint32_t all = (uint32_t{1} << V::W) - 1, before = (uint32_t{1} << (V::W - (p_.Dv - d))) - 1;
    return V::keep(V::from_bits(all & ~before), load_word<V>(row + (p_.Dv - V::W) * size_of(type), type));
  }
  static const char* row_of(const View& v, int64_t b, int64_t h, int64_t i) {
    return at(v, head_offset(v, b, h) + i * v.stride[2]);
  }

  const MaskedAttentionParams& p_;
  T *shift_, *rest_, *delta_;
};

}  // namespace
}  // namespace lam
