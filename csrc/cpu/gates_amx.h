// The products of GateAtt with its gates on AMX tiles: maps, gates and gradients of the logit in bf16, sums in fp32.
//
// A gate's gradient is as large as a head's map, and a block of rows adds to all of it: what it is made of is kept in
// bf16 until the head is through, and multiplied once.
#pragma once
#include <cstdint>
#include <cstring>

#include "amx_packs.h"
#include "arena.h"
#include "schedule.h"
#include "vec_avx512.h"

namespace lam {
namespace {

class AmxGates {
 public:
  using T = float;

  // W^g and -W^l of a call, in pairs along their rows, and where wanted their transposes.
  struct Staged {
    uint16_t *whole, *near, *whole_t = nullptr, *near_t = nullptr;

    Staged(const MapGatedAttentionParams& p, bool transposed, Arena& arena) {
      const int64_t padded = round_up(p.Lk, 32), elements = capacity(p.Lk) * padded;
      float* const row = arena.take<float>(padded);
      uint16_t* const rows = arena.take<uint16_t>((p.Lk + 1) * padded);  // rows are made in twos
      whole = arena.take<uint16_t>(elements);
      near = arena.take<uint16_t>(elements);
      if (transposed) whole_t = arena.take<uint16_t>(elements), near_t = arena.take<uint16_t>(elements);
      if (arena.base == nullptr) return;
      stage(p.gate_global, p.Lk, 1.0f, row, rows, whole, whole_t);
      stage(p.gate_local, p.Lk, -1.0f, row, rows, near, near_t);
    }

    // pairs are read up to a block of 32 past the last row
    static int64_t capacity(int64_t T_) { return round_up(T_, 32) + 32; }

   private:
    static void stage(const View& gate, int64_t T_, float factor, float* row, uint16_t* rows, uint16_t* pairs,
                      uint16_t* transposed) {
      const int64_t padded = round_up(T_, 32);
      for (int64_t r = 0; r < T_; ++r) {
        load_row<VecAvx512>(row, at(gate, r * gate.stride[2]), gate.dtype, gate.stride[3], T_);
        for (int64_t c = 0; c < T_; ++c) row[c] *= factor;
        narrow_rows<false, true>(row, padded, 1, 1, T_, padded, nullptr, rows + r * padded);
      }
      const Bf16Rows staged{rows, padded, T_, T_};
      pack_along_rows(staged, capacity(T_), pairs);
      if (transposed != nullptr) pack_along_width(staged, padded, transposed);
    }
  };

  // A sum is kept in blocks of 16 rows by 16 columns, each transposed.
  static int64_t sum_elements(int64_t T_) { return round_up(T_, 16) * round_up(T_, 16); }

  static constexpr int64_t kRowsStored = 16;
  static void store_sums(const View& grad, float factor, int64_t T_, int64_t block_row, float* sums, int64_t copies,
                         int64_t step) {
    const int64_t padded = round_up(T_, 16);
    alignas(64) float block[16 * 16];
    float* sum = sums + block_row * 16 * padded;
    for (int64_t c = 0; c < padded; c += 16, sum += 256) {
      for (int64_t n = 1; n < copies; ++n)
        for (int64_t k = 0; k < 256; k += 16)
          _mm512_storeu_ps(sum + k, _mm512_add_ps(_mm512_loadu_ps(sum + k), _mm512_loadu_ps(sum + n * step + k)));
      transpose_word_block(sum, 16, block, 16);
      for (int64_t r = 0; r < min64(16, T_ - block_row * 16); ++r)
        store_row<float>(at_mutable(grad, (block_row * 16 + r) * T_ + c), grad.dtype, 1, block + r * 16, factor,
                         min64(16, T_ - c));
    }
  }

  AmxGates(const MapGatedAttentionParams& p, const Staged& staged, int64_t tile_rows, bool backward, Arena& arena)
      : T_(p.Lk),
        padded_(round_up(p.Lk, 32)),
        staged_(staged),
        sums_(backward && (p.grad_gate_global.data || p.grad_gate_local.data)) {
    rows_ = arena.take<uint16_t>(round_up(tile_rows, 32) * padded_);
    if (!backward) return;
    grad_rows_ = arena.take<uint16_t>(round_up(tile_rows, 32) * padded_);
    if (!sums_) return;
    grad_pairs_ = arena.take<uint16_t>(round_up(tile_rows, 32) * padded_);
    grad_t_ = arena.take<uint16_t>(padded_ * padded_);
    whole_pairs_ = arena.take<uint16_t>(padded_ * padded_);
    near_pairs_ = arena.take<uint16_t>(padded_ * (padded_ + 32));
    seen_by_ = arena.take<RowBlocks>(padded_ / 16 + 2);
  }

  void open_head() {
    if (!sums_) return;
    memset(near_pairs_, 0, static_cast<size_t>(padded_ * (padded_ + 32)) * sizeof(uint16_t));
    for (int64_t n = 0; n < padded_ / 16 + 2; ++n) seen_by_[n] = {padded_ / 32, 0};
  }

  void whole_logit(int64_t r0, int64_t rows, const float* whole, float* logit, int64_t ld) const {
    if (sums_) narrow_rows<true, true>(whole, ld, rows, padded_, T_, padded_, whole_pairs_ + r0 * 16, rows_);
    else narrow_rows<false, true>(whole, ld, rows, rows, T_, padded_, nullptr, rows_);
    multiply(false, rows, T_, padded_, rows_, padded_, staged_.whole, 16 * Staged::capacity(T_), logit, ld);
  }
  void add_near_logit(int64_t r, int64_t rows, int64_t lo, int64_t cols, const float* near, int64_t near_ld, float* logit,
                      int64_t ld) const {
    const int64_t padded = round_up(cols, 32);
    if (sums_) narrow_rows<true, true>(near, near_ld, rows, padded_, cols, padded, near_pairs_ + lo * padded_ + r * 16, rows_);
    else narrow_rows<false, true>(near, near_ld, rows, rows, cols, padded, nullptr, rows_);
    for (int64_t n = lo / 16; sums_ && n < ceil_div(lo + cols, 16); ++n) seen_by_[n].include(r / 32);
    multiply(true, rows, T_, padded, rows_, padded, staged_.near + lo * 16, 16 * Staged::capacity(T_), logit, ld);
  }

  void take_logit_grads(int64_t r0, int64_t rows, const float* grad, int64_t ld) {
    if (!sums_) return narrow_rows<false, true>(grad, ld, rows, rows, T_, padded_, nullptr, grad_rows_);
    const int64_t block_rows = round_up(rows, 32);
    narrow_rows<true, true>(grad, ld, rows, block_rows, T_, padded_, grad_pairs_, grad_rows_);
    for (int64_t c = 0; c < T_; c += 16)
      for (int64_t r = 0; r < block_rows; r += 32)
        transpose_word_block(reinterpret_cast<const float*>(grad_pairs_ + c * block_rows + r * 16), 16,
                             reinterpret_cast<float*>(grad_t_ + c * padded_ + r0 + r), padded_ / 2);
  }
  void sum_whole(int64_t, const float*, int64_t, float*) const {}
  void sum_near(int64_t, int64_t, int64_t, int64_t, const float*, int64_t, float*) const {}
  void add_whole_grad(int64_t rows, float* grad, int64_t ld) const {
    multiply(true, rows, T_, padded_, grad_rows_, padded_, staged_.whole_t, 16 * padded_, grad, ld);
  }
  void add_near_grad(int64_t s, int64_t rows, int64_t lo, int64_t cols, float* grad, int64_t ld) const {
    multiply(true, rows, cols, padded_, grad_rows_ + s * padded_, padded_, staged_.near_t + lo * padded_, 16 * padded_, grad, ld);
  }
  void close_head(float* whole_sum, float* near_sum) const {
    const int64_t blocks = ceil_div(T_, 16);
    const auto add = [&](const uint16_t* pairs, int64_t first, int64_t count, int64_t from, int64_t to, float* sum) {
      amx_gemm(true, blocks, count, to - from, grad_t_ + from * 32, padded_, 32, pairs + first * 16 * padded_ + from * 512,
               16 * padded_, 512, {sum + first * 256 * blocks, 16, 256, 256 * blocks});
    };
    if (whole_sum != nullptr) add(whole_pairs_, 0, blocks, 0, padded_ / 32, whole_sum);
    for (int64_t n = 0; near_sum != nullptr && n < blocks; n += 2) {
      const int64_t first = min64(seen_by_[n].first, seen_by_[n + 1].first), last = max64(seen_by_[n].last, seen_by_[n + 1].last);
      if (first < last) add(near_pairs_, n, min64(2, blocks - n), first, last, near_sum);
    }
  }

 private:
  // Blocks of 32 rows whose local map reaches a block of 16 columns.
  struct RowBlocks {
    int64_t first, last;
    void include(int64_t block) {
      first = min64(first, block);
      last = max64(last, block + 1);
    }
  };

  static void multiply(bool add, int64_t rows, int64_t cols, int64_t depth, const uint16_t* A, int64_t lda,
                       const uint16_t* pairs, int64_t block, float* C, int64_t ldc) {
    amx_gemm(add, ceil_div(rows, 16), ceil_div(cols, 16), depth / 32, A, lda, 32, pairs, block, 512, {C, ldc, 16 * ldc, 16});
  }

  int64_t T_, padded_;
  const Staged& staged_;
  bool sums_;
  uint16_t *rows_, *grad_rows_ = nullptr, *grad_pairs_ = nullptr, *grad_t_ = nullptr;
  uint16_t *whole_pairs_ = nullptr, *near_pairs_ = nullptr;
  RowBlocks* seen_by_ = nullptr;
};

}  // namespace
}  // namespace lam
