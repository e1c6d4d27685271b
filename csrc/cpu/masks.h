// The masks of a region, as planes of the kernel's number type, and the planes that collect their gradients.
#pragma once
#include <cstdint>
#include <cstring>

#include "low_rank.h"
#include "rows.h"
#include "softmax.h"
#include "visibility.h"

namespace lam {
namespace {

// Reads a multiplier or bias: in place where it lies in rows of the kernel's number type, else through a staged copy
// that the heads of the region share as far as the operand does. A mask given by factors is built instead of copied.
template <class V>
class MaskReader {
 public:
  using T = typename V::T;
  MaskReader(const View& view, const Factors& factors, int64_t heads, int64_t max_rows, int64_t max_cols, Arena& arena)
      : view_(view), factors_(factors), slices_(heads, factors), product_(factors, max_rows, max_cols, arena) {
    // rows of a product lie no power of two apart, or its columns would meet in one set of the cache
    buffer_ld_ = max_cols + (factors.rank > 0 ? V::W : 0);
    buffer_ = arena.take<T>(any_mask(view, factors) ? max_rows * buffer_ld_ : 0);
  }

  void enter(const Region& region) {
    region_ = region;
    slice_ = -1;
  }

  Plane<const T> select(int64_t b, int64_t h) {
    if (factors_.rank > 0) {
      const int64_t slice = slices_.of(b, h);
      if (slice != slice_) product_.build(region_, b, h, buffer_, buffer_ld_);
      slice_ = slice;
      return {buffer_, buffer_ld_};
    }
    if (view_.data == nullptr) return {};
    const int64_t* s = view_.stride;
    const int64_t slice = b * s[0] + h * s[1];
    const char* origin = at(view_, slice + region_.i0 * s[2] + region_.j0 * s[3]);
    if (size_of(view_.dtype) == sizeof(T) && s[3] * region_.step == 1)
      return {reinterpret_cast<const T*>(origin), s[2] * region_.step};
    const bool one_row = s[2] == 0;
    if (slice != slice_)
      for (int64_t r = 0; r < (one_row ? 1 : region_.rows); ++r)
        load_row<V>(buffer_ + r * buffer_ld_, origin + r * region_.step * s[2] * size_of(view_.dtype), view_.dtype,
                    s[3] * region_.step, region_.cols);
    slice_ = slice;
    return {buffer_, one_row ? 0 : buffer_ld_};
  }

 private:
  const View& view_;
  const Factors& factors_;
  Slices slices_;
  FactorProduct<V> product_;
  T* buffer_;
  int64_t buffer_ld_;
  Region region_{};
  int64_t slice_ = -1;
};

// Where a mask's gradient is summed, decided once a call.
template <class T>
struct GradTarget {
  View grad;                 // the caller's tensor; data null when not wanted
  T* sum = nullptr;          // sums of the kernel's number type in the gradient's own shape, maybe the tensor itself
  int64_t numel = 0;         // of one replica
  int64_t replicas = 1;
  bool in_rows = false;      // rows of whole planes: tiles can add to `sum` directly
  bool store_once = false;   // every element is met in one run of heads: written once, nothing to add to
  bool covered = false;      // every element is met at all
  FactorSums<T> factors;     // instead of all but `covered`, for a mask given by factors
  bool wanted() const { return grad.data != nullptr || factors.wanted(); }
};

// Collects one mask's gradient over the heads of a region that share it.
template <class V>
class MaskGradWriter {
 public:
  using T = typename V::T;
  MaskGradWriter(const GradTarget<T>& target, const MaskedAttentionParams& p, int64_t max_rows, int64_t max_cols,
                 Arena& arena)
      : target_(target), fold_(target.factors, max_rows, max_cols, arena) {
    buffer_ld_ = max_cols + (target.factors.wanted() ? V::W : 0);
    // a row that serves all queries collects them all
    one_row_ = target.grad.data != nullptr && target.grad.stride[2] == 0;
    const bool buffered = target.wanted() && (!target.in_rows || p.n_patterns > 0);
    buffer_ = arena.take<T>(buffered ? (one_row_ ? 1 : max_rows) * buffer_ld_ : 0);
  }

  void enter(const Region& region, int64_t replica) {
    region_ = region;
    replica_ = replica;
    sum_ = target_.sum == nullptr ? nullptr : target_.sum + (target_.replicas > 1 ? replica : 0) * target_.numel;
    slice_ = -1;
  }

  // The plane for head (b, h); `first` tells whether its old contents count.
  Plane<T> select(int64_t b, int64_t h, bool& first) {
    if (!target_.wanted()) return {};
    const int64_t* s = target_.grad.stride;
    const int64_t slice = target_.factors.wanted() ? target_.factors.slices.of(b, h) : b * s[0] + h * s[1];
    const bool fresh = slice != slice_;
    if (fresh) leave();
    slice_ = slice, b_ = b, h_ = h;
    if (target_.in_rows && region_.step == 1) {
      first = fresh && target_.store_once && target_.covered;
      return {sum_ + slice + region_.i0 * s[2] + region_.j0, s[2]};
    }
    first = fresh && target_.covered && !one_row_;
    if (fresh && !first)
      for (int64_t r = 0; r < rows(); ++r)
        memset(buffer_ + r * buffer_ld_, 0, static_cast<size_t>(region_.cols) * sizeof(T));
    return {buffer_, one_row_ ? 0 : buffer_ld_};
  }

  // The heads that share the current plane are through.
  void leave() {
    const int64_t slice = slice_;
    slice_ = -1;
    if (slice < 0 || !target_.wanted() || (target_.in_rows && region_.step == 1)) return;
    if (target_.factors.wanted()) return fold_.fold(region_, b_, h_, replica_, buffer_, buffer_ld_);
    const int64_t* s = target_.grad.stride;
    for (int64_t r = 0; r < rows(); ++r) {
      const T* row = buffer_ + r * buffer_ld_;
      const int64_t to = slice + region_.i(r) * s[2] + region_.j0 * s[3];
      if (sum_ == nullptr) {
        store_row<T>(at_mutable(target_.grad, to), target_.grad.dtype, s[3] * region_.step, row, T(1), region_.cols);
      } else if (s[3] == 0) {
        typename V::reg total = V::zero();
        int64_t c = 0;
        for (; c + V::W <= region_.cols; c += V::W) total = V::add(total, V::load(row + c));
        T sum = V::reduce_add(total);
        for (; c < region_.cols; ++c) sum += row[c];
        sum_[to] += sum;
      } else {
        T* dst = sum_ + to;
        const int64_t stride = s[3] * region_.step;
        if (stride == 1)
          for (int64_t c = 0; c < region_.cols; ++c) dst[c] += row[c];
        else
          for (int64_t c = 0; c < region_.cols; ++c) dst[c * stride] += row[c];
      }
    }
  }

 private:
  int64_t rows() const { return one_row_ ? 1 : region_.rows; }

  const GradTarget<T>& target_;
  FactorFold<V> fold_;
  bool one_row_;
  T* buffer_;
  int64_t buffer_ld_;
  T* sum_ = nullptr;
  Region region_{};
  int64_t slice_ = -1, b_ = 0, h_ = 0, replica_ = 0;  // the heads that share the plane are those of M of (b, h)
};

}  // namespace
}  // namespace lam
