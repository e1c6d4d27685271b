// Rows whose scores all lie far from 0, as those that a large negative bias hides altogether do: lse is then rounded so
// coarsely that it has lost the logarithm of the row's sum, and e^(score - lse) would not add up to 1. Where a call has
// such rows, its maxima and sums are worked out once more before the backward pass, and kept apart.
#pragma once
#include <cstdint>

#include "arena.h"
#include "rows.h"
#include "softmax.h"

namespace lam {
namespace {

// Looks for such rows, and lays out what a second forward pass writes: maxima, logarithms of sums, results nobody reads.
template <class T, size_t N>
class FarRows {
 public:
  // halves: those of the call that have an lse of their own
  FarRows(MaskedAttentionParams* const (&halves)[N]) : rows_(halves[0]->B * halves[0]->H * halves[0]->Lq) {
    for (MaskedAttentionParams* half : halves) {
      far_ = far_ || any_far(static_cast<const T*>(half->lse.data), rows_);
      out_bytes_ = round_up(rows_ * half->Dv * size_of(half->query.dtype), 64);
    }
  }
  bool any() const { return far_; }
  int64_t bytes() const { return far_ ? static_cast<int64_t>(N) * (out_bytes_ + 2 * row_bytes()) : 0; }

  // Lets a forward pass of the halves write to `block`.
  void redirect(MaskedAttentionParams* const (&halves)[N], void* block) const {
    char* free = static_cast<char*>(block);
    for (MaskedAttentionParams* half : halves) {
      half->lse_rest = half->lse;
      half->lse.data = free, free += row_bytes();
      half->lse_rest.data = free, free += row_bytes();
      half->out.data = free, free += out_bytes_;
      half->dropout_p = 0;
    }
  }

 private:
  // e^(score - lse) is off by as many roundings as half of this at most
  static constexpr T kFar = 256;

  static bool any_far(const T* lse, int64_t n) {
    int found = 0;  // no early exit: compilers turn this into vectors
    for (int64_t k = 0; k < n; ++k) {
      const T size = lse[k] < 0 ? -lse[k] : lse[k];
      found |= (size > kFar) & (size < kInfinity<T>);
    }
    return found != 0;
  }
  int64_t row_bytes() const { return round_up(rows_ * static_cast<int64_t>(sizeof(T)), 64); }

  int64_t rows_, out_bytes_ = 0;
  bool far_ = false;
};

}  // namespace
}  // namespace lam
