// Patterns as data: the predicate and the key range of every term, for host and device.
// Everything here has internal linkage: each file that includes it is compiled for another instruction set.
#pragma once
#include "lam.h"

#ifdef __CUDACC__
#define LAM_PATTERN_FN static __host__ __device__ inline
#else
#define LAM_PATTERN_FN [[maybe_unused]] static inline
#endif

namespace lam {

// Keys start, start + step, ... below stop; all others are hidden from every query of the tile.
struct KeyRange {
  int64_t start, stop, step;
};

LAM_PATTERN_FN int64_t min64(int64_t x, int64_t y) { return x < y ? x : y; }
LAM_PATTERN_FN int64_t max64(int64_t x, int64_t y) { return x > y ? x : y; }
LAM_PATTERN_FN int64_t floor_div(int64_t x, int64_t y) { return x / y - (x % y != 0 && (x < 0) != (y < 0)); }
LAM_PATTERN_FN int64_t floor_mod(int64_t x, int64_t y) { return x - floor_div(x, y) * y; }

// Row i and column j meet where i + diagonal == j.
LAM_PATTERN_FN int64_t diagonal(const PatternTerm& t, int64_t Lq, int64_t Lk) { return t.end_aligned ? Lk - Lq : 0; }

// Keys that one query can see by this term, before the step of a dilated one; segments see everything here.
LAM_PATTERN_FN KeyRange row_range(const PatternTerm& t, int64_t i, int64_t Lq, int64_t Lk) {
  const int64_t center = i + diagonal(t, Lq, Lk);
  switch (t.kind) {
    case PatternKind::block_diagonal: {
      if (!t.end_aligned) {
        const int64_t lo = i / t.a * t.a;
        return {min64(lo, Lk), min64(lo + t.a, Lk), 1};
      }
      const int64_t from_end = (Lq - 1 - i) / t.a * t.a;  // first position of the block, counted from the last key
      return {max64(Lk - from_end - t.a, 0), max64(Lk - from_end, 0), 1};
    }
    case PatternKind::toeplitz:
    case PatternKind::dilated_toeplitz:
      // radius may be as large as int64 allows: compare before adding
      return {t.a >= center ? 0 : min64(center - t.a, Lk), t.a >= Lk - 1 - center ? Lk : max64(center + t.a + 1, 0), 1};
    case PatternKind::causal:
      return {0, max64(min64(center + 1, Lk), 0), 1};
    default:
      return {0, Lk, 1};
  }
}

// The part of the predicate that a range cannot say.
LAM_PATTERN_FN bool off_range_visible(const PatternTerm& t, const SegmentIds* segments, int64_t b, int64_t i, int64_t j,
                                      int64_t Lq, int64_t Lk) {
  if (t.kind == PatternKind::dilated_toeplitz) return floor_mod(i + diagonal(t, Lq, Lk) - j, t.b) == 0;
  if (t.kind == PatternKind::segments) {
    const SegmentIds& s = segments[t.a];
    return s.query[b * s.query_stride_b + i * s.query_stride_l] == s.key[b * s.key_stride_b + j * s.key_stride_l];
  }
  return true;
}

LAM_PATTERN_FN KeyRange row_range(const PatternSpec& p, int64_t i, int64_t Lq, int64_t Lk) {
  KeyRange r{0, Lk, 1};
  for (int t = 0; t < p.n_terms; ++t) {
    const KeyRange x = row_range(p.terms[t], i, Lq, Lk);
    r.start = max64(r.start, x.start);
    r.stop = min64(r.stop, x.stop);
  }
  return r;
}

LAM_PATTERN_FN bool visible(const PatternSpec& p, const SegmentIds* segments, int64_t b, int64_t i, int64_t j,
                            int64_t Lq, int64_t Lk) {
  const KeyRange r = row_range(p, i, Lq, Lk);
  if (j < r.start || j >= r.stop) return false;
  for (int t = 0; t < p.n_terms; ++t)
    if (!off_range_visible(p.terms[t], segments, b, i, j, Lq, Lk)) return false;
  return true;
}

// The stride at which a tile of equally spaced queries visits its keys: the dilation of the first dilated term.
LAM_PATTERN_FN int64_t key_step(const PatternSpec& p) {
  for (int t = 0; t < p.n_terms; ++t)
    if (p.terms[t].kind == PatternKind::dilated_toeplitz && p.terms[t].b > 1) return p.terms[t].b;
  return 1;
}

// Queries first, first + step, ..., last (all of one residue) -> their keys. Every bound grows with i, so that the
// first and the last query bound the tile.
LAM_PATTERN_FN KeyRange tile_range(const PatternSpec& p, int64_t first, int64_t last, int64_t Lq, int64_t Lk) {
  KeyRange r{row_range(p, first, Lq, Lk).start, row_range(p, last, Lq, Lk).stop, key_step(p)};
  if (r.step > 1) {
    for (int t = 0; t < p.n_terms; ++t)
      if (p.terms[t].kind == PatternKind::dilated_toeplitz && p.terms[t].b == r.step) {
        r.start += floor_mod(first + diagonal(p.terms[t], Lq, Lk) - r.start, r.step);
        break;
      }
  }
  if (r.stop < r.start) r.stop = r.start;
  return r;
}

}  // namespace lam
