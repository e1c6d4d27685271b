// Masks given by factors, M = rows columns^T + offset: a region of M is built when a head enters it, and the gradient of
// a region is folded into those of the factors when the last head that shares it is through.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "arena.h"
#include "gemm.h"
#include "rows.h"
#include "visibility.h"

namespace lam {
namespace {

inline bool any_mask(const View& dense, const Factors& factors) { return dense.data != nullptr || factors.rank > 0; }
inline bool any_wanted(const Factors& grad) {
  return grad.rows.data != nullptr || grad.columns.data != nullptr || grad.offset.data != nullptr;
}

// Numbers the matrices M, or their gradients: heads that share one have one number.
struct Slices {
  int64_t per_sample = 0, per_head = 0;
  explicit Slices(int64_t H, const Factors& f, const Factors& g = {}) {
    for (const View* v : {&f.rows, &f.columns, &f.offset, &g.rows, &g.columns, &g.offset}) {
      if (v->stride[0] != 0) per_sample = H;
      if (v->stride[1] != 0) per_head = 1;
    }
  }
  int64_t of(int64_t b, int64_t h) const { return b * per_sample + h * per_head; }
};

// `count` rows of a factor of head (b, h), from `first` on and `step` apart.
template <class V>
Rows<typename V::T> stage_factor(const View& v, int64_t rank, int64_t b, int64_t h, int64_t first, int64_t step,
                                 int64_t count, typename V::T* buffer) {
  const char* rows = at(v, b * v.stride[0] + h * v.stride[1] + first * v.stride[2]);
  return stage_rows<V>(rows, v.dtype, v.stride[2] * step, count, rank, buffer);
}
template <class V>
int64_t staged_elements(const View& v, int64_t rank, int64_t count) {
  return in_place<V>(v.dtype) ? 0 : count * round_up(rank, V::W);
}

// Builds regions of M.
template <class V>
class FactorProduct {
 public:
  using T = typename V::T;
  FactorProduct(const Factors& factors, int64_t max_rows, int64_t max_cols, Arena& arena) : f_(factors) {
    if (f_.rank == 0) return;
    panels_ = arena.take<T>(panel_elements<V>(max_cols, f_.rank));
    rows_ = arena.take<T>(staged_elements<V>(f_.rows, f_.rank, max_rows));
    columns_ = arena.take<T>(staged_elements<V>(f_.columns, f_.rank, max_cols));
    offset_ = arena.take<T>(round_up(max_cols, V::W));
  }

  // to [region.rows, ld] = M of head (b, h), whole words a row
  void build(const Region& region, int64_t b, int64_t h, T* to, int64_t ld) {
    const int64_t width = round_up(region.cols, V::W);
    const Rows<T> rows = stage_factor<V>(f_.rows, f_.rank, b, h, region.i0, region.step, region.rows, rows_);
    const Rows<T> columns = stage_factor<V>(f_.columns, f_.rank, b, h, region.j0, region.step, region.cols, columns_);
    pack_transposed<V>(columns, region.cols, f_.rank, panels_);
    if (f_.offset.data == nullptr) return multiply<false>(rows, region.rows, width, to, ld);
    const int64_t* s = f_.offset.stride;
    memset(offset_, 0, static_cast<size_t>(width) * sizeof(T));
    load_row<V>(offset_, at(f_.offset, b * s[0] + h * s[1] + region.j0 * s[3]), f_.offset.dtype, s[3] * region.step,
                region.cols);
    for (int64_t r = 0; r < region.rows; ++r) memcpy(to + r * ld, offset_, static_cast<size_t>(width) * sizeof(T));
    multiply<true>(rows, region.rows, width, to, ld);
  }

 private:
  template <bool kAdd>
  void multiply(Rows<T> rows, int64_t count, int64_t width, T* to, int64_t ld) const {
    gemm<V, false, kAdd, true>(count, width, f_.rank, rows.data, rows.ld, panels_, f_.rank * V::W, to, ld);
  }

  const Factors& f_;
  T *panels_ = nullptr, *rows_ = nullptr, *columns_ = nullptr, *offset_ = nullptr;
};

// Where the gradient of one factor is summed, slice by slice, maybe in the caller's tensor itself.
template <class T>
struct FactorSum {
  View grad;
  T* sum = nullptr;
  int64_t length = 0, width = 0;  // rows of a slice
  int64_t slices = 0, stride_b = 0, stride_h = 0;
  int64_t replicas = 1;

  FactorSum() = default;
  FactorSum(const MaskedAttentionParams& p, const View& g, int64_t rows, int64_t row_width, int64_t copies) {
    if (g.data == nullptr) return;
    grad = g, length = rows, width = row_width, replicas = copies;
    const int64_t batch = g.stride[0] != 0 ? p.B : 1, heads = g.stride[1] != 0 ? p.H : 1;
    slices = batch * heads;
    stride_b = batch > 1 ? heads * length * width : 0;
    stride_h = heads > 1 ? length * width : 0;
    if (size_of(g.dtype) == sizeof(T) && replicas == 1) sum = static_cast<T*>(g.data);
  }
  bool wanted() const { return grad.data != nullptr; }
  int64_t numel() const { return slices * length * width; }
  // Bytes of sums outside of the caller's tensor.
  int64_t bytes() const {
    const bool own = wanted() && sum != grad.data;
    return own ? round_up(numel() * replicas * static_cast<int64_t>(sizeof(T)), 64) : 0;
  }
  T* slice(int64_t b, int64_t h, int64_t replica) const {
    return sum + (replicas > 1 ? replica : 0) * numel() + b * stride_b + h * stride_h;
  }
  void clear() const {
    if (wanted()) memset(sum, 0, static_cast<size_t>(numel() * replicas) * sizeof(T));
  }
  // The copies are added up, always in the same order, and stored in the gradient's own type.
  void finish() const {
    if (!wanted() || sum == grad.data) return;
    for (int64_t r = 1; r < replicas; ++r)
      for (int64_t k = 0, n = numel(); k < n; ++k) sum[k] += sum[r * n + k];
    store_row<T>(at_mutable(grad, 0), grad.dtype, 1, sum, T(1), numel());
  }
};

template <class T>
struct FactorSums {
  const Factors* factors = nullptr;
  Slices slices{1, {}};
  FactorSum<T> rows, columns, offset;
  bool wanted() const { return rows.wanted() || columns.wanted() || offset.wanted(); }
  int64_t bytes() const { return rows.bytes() + columns.bytes() + offset.bytes(); }
  // Takes bytes() from `at` on.
  void place(char* at) {
    FactorSum<T>* const all[] = {&rows, &columns, &offset};
    for (FactorSum<T>* f : all) {
      const int64_t bytes = f->bytes();
      if (bytes > 0) f->sum = reinterpret_cast<T*>(at);
      at += bytes;
    }
  }
  void clear() const { rows.clear(), columns.clear(), offset.clear(); }
  void finish() const { rows.finish(), columns.finish(), offset.finish(); }
};

// Folds regions of the gradient of M into the gradients of the factors: rows += G columns, columns += G^T rows,
// offset += the sum of G over its rows.
template <class V>
class FactorFold {
 public:
  using T = typename V::T;
  FactorFold(const FactorSums<T>& sums, int64_t max_rows, int64_t max_cols, Arena& arena) : sums_(sums) {
    if (!sums.wanted()) return;
    const Factors& f = *sums.factors;
    staged_ = arena.take<T>(max64(staged_elements<V>(f.rows, f.rank, max_rows), staged_elements<V>(f.columns, f.rank, max_cols)));
  }

  void fold(const Region& region, int64_t b, int64_t h, int64_t replica, const T* G, int64_t ld) {
    const Factors& f = *sums_.factors;
    const int64_t step = region.step;
    if (sums_.rows.wanted()) {
      const Rows<T> columns = stage_factor<V>(f.columns, f.rank, b, h, region.j0, step, region.cols, staged_);
      const int64_t to = sums_.rows.width;
      gemm<V, false, true>(region.rows, f.rank, region.cols, G, ld, columns.data, columns.ld,
                           sums_.rows.slice(b, h, replica) + region.i0 * to, to * step);
    }
    if (sums_.columns.wanted()) {
      const Rows<T> rows = stage_factor<V>(f.rows, f.rank, b, h, region.i0, step, region.rows, staged_);
      const int64_t to = sums_.columns.width;
      gemm<V, true, true>(region.cols, f.rank, region.rows, G, ld, rows.data, rows.ld,
                          sums_.columns.slice(b, h, replica) + region.j0 * to, to * step);
    }
    if (sums_.offset.wanted()) {
      T* to = sums_.offset.slice(b, h, replica) + region.j0;
      for (int64_t c = 0; c < region.cols; c += V::W) {
        alignas(64) T total[V::W];
        typename V::reg sum = V::zero();
        const auto inside = V::from_bits(static_cast<uint32_t>(low_bits(min64(V::W, region.cols - c))));
        for (int64_t r = 0; r < region.rows; ++r) sum = V::add(sum, V::load(G + r * ld + c, inside));
        V::store(total, sum);
        for (int64_t k = 0; k < min64(V::W, region.cols - c); ++k) to[(c + k) * step] += total[k];
      }
    }
  }

 private:
  const FactorSums<T>& sums_;
  T* staged_ = nullptr;
};

}  // namespace
}  // namespace lam
