// Small matrix products on tiles that lie in cache: C (+)= A B and C (+)= A^T B, B in rows or in panels: a word wide, its
// rows one after another, ldb from panel to panel.
#pragma once
#include <cstdint>

namespace lam {
namespace {

// Depth of one pass: a B block of this many rows by kCols words stays in L1 while the rows of A go by. Rows a power of
// two apart share few of its sets, and fewer of them stay.
inline int64_t pass_depth(int64_t row_bytes) {
  const int64_t power = row_bytes & -row_bytes;
  return power <= 256 ? 128 : power >= 2048 ? 16 : 32768 / power;
}

// How rows of B and C end: in whole words, in a part of one, or B in panels, whose words are whole.
enum class RowEnd { whole, part, panels };

template <class V, int MR, int NR, bool TransA, bool Accumulate, RowEnd End>
__attribute__((always_inline)) inline void gemm_registers(int64_t K, const typename V::T* __restrict A, int64_t lda,
                                                          const typename V::T* __restrict B, int64_t ldb,
                                                          typename V::T* __restrict C, int64_t ldc,
                                                          typename V::mask last) {
  constexpr bool kPanels = End == RowEnd::panels;
  const auto load = [&](const typename V::T* from, int n) {
    return End == RowEnd::part && n == NR - 1 ? V::load(from, last) : V::load(from);
  };
  typename V::reg c[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) c[m][n] = Accumulate ? load(C + m * ldc + n * V::W, n) : V::zero();
  for (int64_t k = 0; k < K; ++k) {
    typename V::reg b[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) b[n] = load(kPanels ? B + k * V::W + n * ldb : B + k * ldb + n * V::W, n);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const typename V::reg a = V::set1(TransA ? A[k * lda + m] : A[m * lda + k]);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) c[m][n] = V::fma(a, b[n], c[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      typename V::T* to = C + m * ldc + n * V::W;
      if (End == RowEnd::part && n == NR - 1) V::store(to, c[m][n], last);
      else V::store(to, c[m][n]);
    }
}

// The rows that are left over, fewer than a register tile has.
template <class V, int MR, int NR, bool TransA, bool Accumulate, RowEnd End>
inline void gemm_last_rows(int64_t M, int64_t K, const typename V::T* A, int64_t lda, const typename V::T* B,
                           int64_t ldb, typename V::T* C, int64_t ldc, typename V::mask last) {
  if constexpr (MR > 0) {
    if (M == MR) {
      gemm_registers<V, MR, NR, TransA, Accumulate, End>(K, A, lda, B, ldb, C, ldc, last);
    } else {
      gemm_last_rows<V, MR - 1, NR, TransA, Accumulate, End>(M, K, A, lda, B, ldb, C, ldc, last);
    }
  }
}

template <class V, int NR, bool TransA, bool Accumulate, RowEnd End>
void gemm_columns(int64_t M, int64_t K, const typename V::T* A, int64_t lda, const typename V::T* B, int64_t ldb,
                  typename V::T* C, int64_t ldc, typename V::mask last) {
  int64_t m = 0;
  if constexpr (2 * NR <= V::kCols)  // few columns: more rows, for enough sums to be under way at once
    for (; m + 2 * V::kRows <= M; m += 2 * V::kRows)
      gemm_registers<V, 2 * V::kRows, NR, TransA, Accumulate, End>(K, A + (TransA ? m : m * lda), lda, B, ldb, C + m * ldc, ldc, last);
  for (; m + V::kRows <= M; m += V::kRows)
    gemm_registers<V, V::kRows, NR, TransA, Accumulate, End>(K, A + (TransA ? m : m * lda), lda, B, ldb, C + m * ldc, ldc, last);
  gemm_last_rows<V, V::kRows - 1, NR, TransA, Accumulate, End>(M - m, K, A + (TransA ? m : m * lda), lda, B, ldb,
                                                          C + m * ldc, ldc, last);
}

template <class V, int NR, bool TransA, bool Accumulate, RowEnd End>
void gemm_last_columns(int64_t words, int64_t M, int64_t K, const typename V::T* A, int64_t lda,
                       const typename V::T* B, int64_t ldb, typename V::T* C, int64_t ldc, typename V::mask last) {
  if constexpr (NR > 0) {
    if (words == NR) {
      gemm_columns<V, NR, TransA, Accumulate, End>(M, K, A, lda, B, ldb, C, ldc, last);
    } else {
      gemm_last_columns<V, NR - 1, TransA, Accumulate, End>(words, M, K, A, lda, B, ldb, C, ldc, last);
    }
  }
}

// C [M, cols] = (Accumulate ? C : 0) + A [M, K] B, or A^T with A stored [K, M]. Of B in panels, C gets whole words.
template <class V, bool TransA, bool Accumulate, bool Panels = false>
void gemm(int64_t M, int64_t cols, int64_t K, const typename V::T* A, int64_t lda, const typename V::T* B, int64_t ldb,
          typename V::T* C, int64_t ldc) {
  constexpr RowEnd kWhole = Panels ? RowEnd::panels : RowEnd::whole, kLast = Panels ? kWhole : RowEnd::part;
  const int64_t row = Panels ? V::W : ldb, word = Panels ? ldb : V::W, over = Panels ? 0 : cols % V::W;
  const int64_t most = pass_depth(row * static_cast<int64_t>(sizeof(typename V::T))), words = (cols + V::W - 1) / V::W;
  const auto last = V::from_bits((uint32_t{1} << over) - 1);
  for (int64_t k = 0; k < K; k += most) {
    const int64_t depth = K - k < most ? K - k : most;
    const typename V::T* Ak = A + (TransA ? k * lda : k);
    const bool add = Accumulate || k > 0;
    for (int64_t n = 0; n < words; n += V::kCols) {
      const int64_t left = words - n < V::kCols ? words - n : V::kCols;
      const typename V::T* Bk = B + k * row + n * word;
      typename V::T* Cn = C + n * V::W;
      if (over > 0 && n + left == words) {
        if (add) gemm_last_columns<V, V::kCols, TransA, true, kLast>(left, M, depth, Ak, lda, Bk, ldb, Cn, ldc, last);
        else gemm_last_columns<V, V::kCols, TransA, false, kLast>(left, M, depth, Ak, lda, Bk, ldb, Cn, ldc, last);
      } else {
        if (add) gemm_last_columns<V, V::kCols, TransA, true, kWhole>(left, M, depth, Ak, lda, Bk, ldb, Cn, ldc, last);
        else gemm_last_columns<V, V::kCols, TransA, false, kWhole>(left, M, depth, Ak, lda, Bk, ldb, Cn, ldc, last);
      }
    }
  }
}

}  // namespace
}  // namespace lam
