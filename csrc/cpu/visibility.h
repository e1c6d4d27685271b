// Which pairs of a region may be seen, as one bit a pair: pattern, attn_mask and key_mask together.
#pragma once
#include <cstdint>
#include <cstring>

#include "../patterns.h"
#include "arena.h"

namespace lam {
namespace {

// A rectangle of pairs: query i0 + r * step meets key j0 + c * step.
struct Region {
  int64_t i0, rows, j0, cols, step;
  int64_t i(int64_t r) const { return i0 + r * step; }
  int64_t j(int64_t c) const { return j0 + c * step; }
};

inline uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : n <= 0 ? 0 : (uint64_t{1} << n) - 1; }

// Which of eight bytes are not zero, the first byte's answer in bit 0.
inline uint64_t nonzero_bytes(uint64_t bytes) {
  constexpr uint64_t kLow7 = 0x7f7f7f7f7f7f7f7f, kGather = 0x0102040810204080;  // of bit 8k to bit 56 + k
  return (((((bytes & kLow7) + kLow7) | bytes) & ~kLow7) >> 7) * kGather >> 56;
}

// Bits of at most 64 bools that lie `stride` bytes apart.
inline uint64_t bits_of_bytes(const uint8_t* p, int64_t stride, int64_t n) {
  if (stride == 0) return n > 0 && *p ? low_bits(n) : 0;
  uint64_t bits = 0;
  int64_t k = 0;
  if (stride == 1) {
    for (; k + 8 <= n; k += 8) {
      uint64_t bytes;
      memcpy(&bytes, p + k, 8);
      bits |= nonzero_bytes(bytes) << k;
    }
  }
  for (; k < n; ++k) bits |= uint64_t{p[k * stride] != 0} << k;
  return bits;
}

inline const PatternSpec& spec_of_head(const MaskedAttentionParams& p, int64_t h) {
  return p.patterns[p.n_patterns == 1 ? 0 : h];
}

class Visibility {
 public:
  static bool needed(const MaskedAttentionParams& p) {
    return p.n_patterns > 0 || p.attn_mask.data != nullptr || p.key_mask.data != nullptr;
  }
  static int64_t words_per_row(int64_t cols) { return (cols + 63) / 64; }

  // For regions of at most that many rows and columns.
  Visibility(const MaskedAttentionParams& p, int64_t max_rows, int64_t max_cols, Arena& arena)
      : p_(p),
        period_(period(p)),
        words_(arena.take<uint64_t>(max_rows * words_per_row(max_cols))),
        key_words_(arena.take<uint64_t>(words_per_row(max_cols))),
        segment_words_(arena.take<uint64_t>(kKeptSegments * words_per_row(max_cols))) {}

  void enter(const Region& region) {
    const bool same = period_ > 0 && (region.i0 - region_.i0) % period_ == 0 &&
                      region.j0 - region.i0 == region_.j0 - region_.i0 && region.rows == region_.rows &&
                      region.cols == region_.cols && region.step == region_.step;
    region_ = region;
    if (same) return;
    ld_ = words_per_row(region.cols);
    b_ = spec_ = attn_ = -1;
    n_segments_ = 0;
  }

  // Makes the bits those of head (b, h), unless they are already.
  void select(int64_t b, int64_t h) {
    const int64_t spec = p_.n_patterns > 1 ? h : 0;
    const int64_t attn = p_.attn_mask.data == nullptr ? 0 : b * p_.attn_mask.stride[0] + h * p_.attn_mask.stride[1];
    if (b == b_ && spec == spec_ && attn == attn_) return;
    if (b != b_) fill_key_words(b), n_segments_ = 0;
    b_ = b, spec_ = spec, attn_ = attn;
    for (int64_t r = 0; r < region_.rows; ++r) fill_row(r);
  }

  const uint64_t* row(int64_t r) const { return words_ + r * ld_; }
  int64_t ld() const { return ld_; }

  // Narrows columns [lo, hi) to those that any of the rows sees, and returns whether every row sees all of these. lo comes
  // out as a multiple of a vector's width.
  template <class V>
  bool narrow(int64_t r0, int64_t rows, int64_t& lo, int64_t& hi) const {
    int64_t first = hi, last = lo, seen_by_all = 0;
    for (int64_t w = lo / 64; w * 64 < hi; ++w) {
      const uint64_t inside = low_bits(hi - w * 64) & ~low_bits(lo - w * 64);
      uint64_t any = 0, every = ~uint64_t{0};
      for (int64_t r = r0; r < r0 + rows; ++r) {
        any |= words_[r * ld_ + w];
        every &= words_[r * ld_ + w];
      }
      any &= inside;
      if (any == 0) continue;
      seen_by_all += __builtin_popcountll(every & inside);
      if (first == hi) first = w * 64 + __builtin_ctzll(any);
      last = w * 64 + 64 - __builtin_clzll(any);
    }
    lo = first < last ? first / V::W * V::W : first;
    hi = last;
    return seen_by_all == hi - lo;
  }

 private:
  // The bits of regions that lie alike towards the diagonal are the same when they are a multiple of this apart; 0 if never.
  static int64_t period(const MaskedAttentionParams& p) {
    if (p.attn_mask.data != nullptr || p.key_mask.data != nullptr) return 0;
    int64_t block = 1;
    for (int64_t h = 0; h < p.n_patterns; ++h)
      for (int t = 0; t < p.patterns[h].n_terms; ++t) {
        const PatternTerm& term = p.patterns[h].terms[t];
        if (term.kind == PatternKind::segments) return 0;
        if (term.kind != PatternKind::block_diagonal || block % term.a == 0) continue;
        if (term.a % block != 0) return 0;
        block = term.a;
      }
    return block;
  }

  void fill_key_words(int64_t b) {
    for (int64_t w = 0; w < ld_; ++w) {
      const int64_t n = min64(64, region_.cols - w * 64);
      key_words_[w] = low_bits(n);
      if (p_.key_mask.data == nullptr) continue;
      const int64_t stride = p_.key_mask.stride[3];
      const uint8_t* keys = static_cast<const uint8_t*>(p_.key_mask.data) + b * p_.key_mask.stride[0];
      key_words_[w] = bits_of_bytes(keys + region_.j(w * 64) * stride, stride * region_.step, n);
    }
  }

  void fill_row(int64_t r) {
    uint64_t* row = words_ + r * ld_;
    const int64_t i = region_.i(r), step = region_.step;
    int64_t lo = 0, hi = region_.cols;
    const PatternSpec* spec = p_.n_patterns > 0 ? &p_.patterns[spec_] : nullptr;
    if (spec != nullptr) {
      const KeyRange range = row_range(*spec, i, p_.Lq, p_.Lk);
      lo = max64(lo, -floor_div(region_.j0 - range.start, step));
      hi = min64(hi, -floor_div(region_.j0 - range.stop, step));
    }
    for (int64_t w = 0; w < ld_; ++w) row[w] = key_words_[w] & low_bits(hi - w * 64) & ~low_bits(lo - w * 64);
    if (p_.attn_mask.data != nullptr) {
      const int64_t* s = p_.attn_mask.stride;
      const uint8_t* mask = static_cast<const uint8_t*>(p_.attn_mask.data) + attn_ + i * s[2] + region_.j0 * s[3];
      for (int64_t w = 0; w < ld_; ++w)
        if (row[w] != 0) row[w] &= bits_of_bytes(mask + w * 64 * step * s[3], step * s[3], min64(64, region_.cols - w * 64));
    }
    for (int t = 0; spec != nullptr && t < spec->n_terms; ++t) {
      const PatternTerm& term = spec->terms[t];
      const bool dilated = term.kind == PatternKind::dilated_toeplitz && term.b > 1;
      if (!dilated && term.kind != PatternKind::segments) continue;
      if (dilated && step % term.b == 0) {  // every key of the row has the same residue
        if (off_range_visible(term, p_.segments, b_, i, region_.j0, p_.Lq, p_.Lk)) continue;
        for (int64_t w = 0; w < ld_; ++w) row[w] = 0;
        continue;
      }
      if (!dilated) {
        const uint64_t* segment = words_of_segment(term.a, i);
        for (int64_t w = 0; w < ld_; ++w) row[w] &= segment[w];
        continue;
      }
      for (int64_t w = 0; w < ld_; ++w) {
        if (row[w] == 0) continue;
        uint64_t bits = 0;
        const int64_t n = min64(64, region_.cols - w * 64);
        for (int64_t k = 0; k < n; ++k)
          bits |= uint64_t{off_range_visible(term, p_.segments, b_, i, region_.j(w * 64 + k), p_.Lq, p_.Lk)} << k;
        row[w] &= bits;
      }
    }
  }

  // The keys of query i's segment. Rows of few segments take turns: the last ones are kept.
  const uint64_t* words_of_segment(int64_t pair, int64_t i) {
    const SegmentIds& s = p_.segments[pair];
    const int64_t id = s.query[b_ * s.query_stride_b + i * s.query_stride_l];
    const int64_t kept = min64(n_segments_, kKeptSegments);
    for (int64_t n = 0; n < kept; ++n)
      if (segments_[n].pair == pair && segments_[n].id == id) return segment_words_ + n * ld_;
    const int64_t slot = n_segments_++ % kKeptSegments;
    segments_[slot] = {pair, id};
    uint64_t* words = segment_words_ + slot * ld_;
    const int64_t stride = s.key_stride_l * region_.step;
    const int64_t* keys = s.key + b_ * s.key_stride_b + region_.j0 * s.key_stride_l;
    for (int64_t w = 0; w < ld_; ++w) {
      const int64_t n = min64(64, region_.cols - w * 64);
      uint64_t bits = 0;
      if (stride == 1)
        for (int64_t k = 0; k < n; ++k) bits |= uint64_t{keys[w * 64 + k] == id} << k;
      else
        for (int64_t k = 0; k < n; ++k) bits |= uint64_t{keys[(w * 64 + k) * stride] == id} << k;
      words[w] = bits;
    }
    return words;
  }

  static constexpr int64_t kKeptSegments = 4;
  struct Segment {
    int64_t pair, id;
  };

  const MaskedAttentionParams& p_;
  int64_t period_;
  uint64_t *words_, *key_words_, *segment_words_;
  Segment segments_[kKeptSegments];
  int64_t n_segments_ = 0;  // that were met since the region or the sample changed
  Region region_{};
  int64_t ld_ = 0, b_ = -1, spec_ = -1, attn_ = -1;
};

}  // namespace
}  // namespace lam
