// Seeded random problems of masked_attention without torch, for the drivers that run kernels under sanitizers: every
// operand lies in a heap block of exactly its size, and every result is compared with a loop in double.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "patterns.h"
#include "philox.h"

namespace {

using lam::DType;
using lam::View;

struct Random {
  uint64_t state;
  uint64_t next() {  // xorshift64*
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Dull;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>((next() >> 33) % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return below(100) < percent; }
  template <size_t N>
  int64_t pick(const int64_t (&values)[N]) {
    return values[below(N)];
  }
};

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
const char* name_of(DType dtype) {
  constexpr const char* names[] = {"fp32", "bf16", "fp16", "fp64"};
  return names[static_cast<int>(dtype)];
}
double unit_roundoff(DType dtype) {
  constexpr double roundoff[] = {0x1p-24, 0x1p-9, 0x1p-12, 0x1p-53};
  return roundoff[static_cast<int>(dtype)];
}

uint16_t float_to_half(float value) {  // exact for what the problems hold: 0, -inf and multiples of 1/64 up to 4
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (value == 0) return sign;
  if (std::isinf(value)) return sign | 0x7c00;
  return static_cast<uint16_t>(sign | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
}

double half_to_double(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 0x3ff;
  double value = exponent == 0    ? std::ldexp(fraction, -24)
                 : exponent != 31 ? std::ldexp(fraction + 1024, exponent - 25)
                 : fraction       ? NAN
                                  : INFINITY;
  return h & 0x8000 ? -value : value;
}

// An operand in a heap block that ends with its last element: one element further is an error that is reported.
struct Operand {
  View view;
  int64_t shape[4] = {1, 1, 1, 1};
  std::unique_ptr<char[]> memory;

  int64_t elements() const { return shape[0] * shape[1] * shape[2] * shape[3]; }
  char* at(const int64_t (&index)[4]) const {
    int64_t offset = 0;
    for (int axis = 0; axis < 4; ++axis) offset += index[axis] * view.stride[axis];
    return static_cast<char*>(view.data) + offset * size_of(view.dtype);
  }
  double get(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const char* p = at({b, h, i, j});
    float f;
    double d;
    uint16_t u;
    uint32_t bits;
    switch (view.dtype) {
      case DType::f64:
        return std::memcpy(&d, p, 8), d;
      case DType::f32:
        return std::memcpy(&f, p, 4), f;
      case DType::f16:
        return std::memcpy(&u, p, 2), half_to_double(u);
      default:
        std::memcpy(&u, p, 2), bits = static_cast<uint32_t>(u) << 16;
        return std::memcpy(&f, &bits, 4), f;
    }
  }
  void set(double value, int64_t b, int64_t h, int64_t i, int64_t j) const {
    char* p = at({b, h, i, j});
    const float f = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t u = view.dtype == DType::f16 ? float_to_half(f) : static_cast<uint16_t>(bits >> 16);
    if (view.dtype == DType::f64) std::memcpy(p, &value, 8);
    else if (view.dtype == DType::f32) std::memcpy(p, &f, 4);
    else std::memcpy(p, &u, 2);
  }
};

template <class F>
void for_each(const int64_t (&shape)[4], const F& f) {
  for (int64_t b = 0; b < shape[0]; ++b)
    for (int64_t h = 0; h < shape[1]; ++h)
      for (int64_t i = 0; i < shape[2]; ++i)
        for (int64_t j = 0; j < shape[3]; ++j) f(b, h, i, j);
}

// order: the axes from the outermost in memory to the innermost; gap: unused elements after each innermost row.
// Filled with 0xff, which is NaN in every type, so that what is read before it is written shows.
Operand make(DType dtype, int64_t s0, int64_t s1, int64_t s2, int64_t s3, const int (&order)[4] = {0, 1, 2, 3},
             int64_t gap = 0) {
  Operand o;
  o.view.dtype = dtype;
  const int64_t shape[4] = {s0, s1, s2, s3};
  std::memcpy(o.shape, shape, sizeof shape);
  int64_t stride = 1, last = 0;
  for (int k = 3; k >= 0; --k) {
    const int axis = order[k];
    o.view.stride[axis] = shape[axis] == 1 ? 0 : stride;
    last += (shape[axis] - 1) * o.view.stride[axis];
    stride = stride * shape[axis] + (k == 3 ? gap : 0);
  }
  const size_t bytes = static_cast<size_t>((last + 1) * size_of(dtype));
  o.memory.reset(new char[bytes]);
  std::memset(o.memory.get(), 0xff, bytes);
  o.view.data = o.memory.get();
  return o;
}

// A mask by its factors, or their gradients; nothing has memory when the mask is dense or absent.
struct FactorOperands {
  Operand rows, columns, offset;
  double get(int64_t b, int64_t h, int64_t i, int64_t j) const {
    double sum = offset.memory ? offset.get(b, h, 0, j) : 0;
    for (int64_t k = 0; k < rows.shape[3]; ++k) sum += rows.get(b, h, i, k) * columns.get(b, h, j, k);
    return sum;
  }
  lam::Factors view(int64_t rank) const {
    lam::Factors f;
    f.rank = rank, f.rows = rows.view, f.columns = columns.view, f.offset = offset.view;
    return f;
  }
};

struct Problem {
  lam::MaskedAttentionParams p{};
  FactorOperands factors[2], grad_factors[2];  // of the multiplier and of the bias
  Operand query, key, value, multiplier, bias, grad_out, grad_lse, out, lse;
  Operand grad_query, grad_key, grad_value, grad_multiplier, grad_bias;
  std::unique_ptr<char[]> attn_mask, key_mask;
  std::vector<lam::PatternSpec> specs;
  std::vector<lam::SegmentIds> segments;
  std::vector<std::unique_ptr<int64_t[]>> ids;
};

Operand random_rows(Random& r, DType dtype, int64_t B, int64_t H, int64_t L, int64_t D) {
  const int64_t gap = r.chance(30) ? 1 + r.below(5) : 0;
  Operand o = r.chance(40) ? make(dtype, B, H, L, D, {0, 2, 1, 3}, gap) : make(dtype, B, H, L, D, {0, 1, 2, 3}, gap);
  o.view.stride[3] = 1;
  for_each(o.shape, [&](auto... at) { o.set(static_cast<double>(r.below(129) - 64) / 64, at...); });
  return o;
}

Operand random_mask(Random& r, const lam::MaskedAttentionParams& p, DType dtype, bool gate, bool hides) {
  const int64_t B = r.chance(50) ? 1 : p.B, H = r.chance(50) ? 1 : p.H, Lq = r.chance(25) ? 1 : p.Lq,
                Lk = r.chance(25) ? 1 : p.Lk;
  Operand o = r.chance(20) ? make(dtype, B, H, Lq, Lk, {0, 1, 3, 2}) : make(dtype, B, H, Lq, Lk);
  for_each(o.shape, [&](auto... at) {
    double value = static_cast<double>(r.below(129) - 64) / 64;
    if (gate) value = r.chance(20) ? 0 : std::abs(value);
    else if (hides && r.chance(10)) value = -INFINITY;
    o.set(value, at...);
  });
  return o;
}

FactorOperands random_factors(Random& r, const lam::MaskedAttentionParams& p, DType dtype, bool hides) {
  constexpr int64_t kRanks[] = {1, 3, 16, 17, 40};
  const int64_t rank = r.pick(kRanks);
  FactorOperands f;
  auto batch = [&] { return r.chance(50) ? 1 : p.B; };
  auto heads = [&] { return r.chance(50) ? 1 : p.H; };
  f.rows = random_rows(r, dtype, batch(), heads(), p.Lq, rank);
  f.columns = random_rows(r, dtype, batch(), heads(), p.Lk, rank);
  // random_rows counts every axis, but a broadcast one has stride 0
  for (Operand* o : {&f.rows, &f.columns})
    for (int axis = 0; axis < 3; ++axis)
      if (o->shape[axis] == 1) o->view.stride[axis] = 0;
  if (r.chance(60)) {
    f.offset = make(dtype, batch(), heads(), 1, p.Lk);
    for_each(f.offset.shape, [&](auto... at) {
      f.offset.set(hides && r.chance(10) ? -INFINITY : static_cast<double>(r.below(129) - 64) / 64, at...);
    });
  }
  return f;
}

lam::PatternSpec random_spec(Random& r, Problem& problem) {
  const lam::MaskedAttentionParams& p = problem.p;
  lam::PatternSpec spec;
  spec.n_terms = static_cast<int32_t>(r.below(3));
  for (int t = 0; t < spec.n_terms; ++t) {
    lam::PatternTerm& term = spec.terms[t];
    term = {static_cast<lam::PatternKind>(r.below(5)), static_cast<int32_t>(r.below(2)), 0, 1};
    if (term.kind == lam::PatternKind::block_diagonal) term.a = 1 + r.below(p.Lk + 3);
    if (term.kind == lam::PatternKind::toeplitz) term.a = r.chance(5) ? INT64_MAX : r.below(p.Lk + 3);
    if (term.kind == lam::PatternKind::dilated_toeplitz) term.a = r.below(p.Lk + 3), term.b = 1 + r.below(5);
    if (term.kind == lam::PatternKind::segments) {
      const int64_t batch = r.chance(50) ? 1 : p.B, n = 1 + r.below(4);
      term.a = static_cast<int64_t>(problem.segments.size());
      auto fill = [&](int64_t L) {
        problem.ids.emplace_back(new int64_t[static_cast<size_t>(batch * L)]);
        for (int64_t k = 0; k < batch * L; ++k) problem.ids.back()[static_cast<size_t>(k)] = r.below(n);
        return problem.ids.back().get();
      };
      lam::SegmentIds s;
      s.query = fill(p.Lq), s.key = fill(p.Lk);
      s.query_stride_b = batch == 1 ? 0 : p.Lq, s.key_stride_b = batch == 1 ? 0 : p.Lk;
      s.query_stride_l = p.Lq == 1 ? 0 : 1, s.key_stride_l = p.Lk == 1 ? 0 : 1;
      problem.segments.push_back(s);
    }
  }
  return spec;
}

Operand gradient_of(const Operand& o, bool rows) {
  Operand grad = make(o.view.dtype, o.shape[0], o.shape[1], o.shape[2], o.shape[3]);
  if (rows) grad.view.stride[3] = 1;
  return grad;
}

// Tasks are logical: any order and any thread must give the same result, so they run backwards on two threads.
void parallel_for(int64_t n, void (*body)(void*, int64_t), void* ctx) {
  auto run = [=](int64_t first) {
    for (int64_t task = first; task >= 0; task -= 2) body(ctx, task);
  };
  if (n < 2) return run(n - 1);
  std::thread other(run, n - 2);
  run(n - 1);
  other.join();
}

std::unique_ptr<Problem> random_problem(Random& r, DType dtype) {
  constexpr int64_t kBatch[] = {1, 1, 2, 3}, kHeads[] = {1, 2, 4}, kHead[] = {1, 7, 16, 24, 33, 64, 80};
  constexpr int64_t kLengths[] = {1, 3, 16, 17, 50, 63, 65, 100, 131};
  auto problem = std::make_unique<Problem>();
  lam::MaskedAttentionParams& p = problem->p;
  p.B = r.pick(kBatch), p.Hkv = r.pick(kHeads), p.H = p.Hkv * (r.chance(70) ? 1 : 2);
  p.Lq = r.pick(kLengths), p.Lk = r.chance(50) ? p.Lq : r.pick(kLengths);
  p.D = r.chance(3) ? 256 : r.pick(kHead), p.Dv = r.chance(60) ? p.D : r.chance(3) ? 256 : r.pick(kHead);
  if (r.chance(11)) {  // a head of several regions
    constexpr int64_t kLong[] = {400, 513}, kNarrow[] = {7, 16};
    p.B = p.Hkv = p.H = 1;
    p.Lq = r.pick(kLong), p.Lk = r.chance(50) ? p.Lq : r.pick(kLong);
    p.D = r.pick(kNarrow), p.Dv = r.pick(kNarrow);
  }
  p.scale = 1 / std::sqrt(static_cast<double>(p.D));
  p.dropout_p = r.chance(25) ? 0.25 : 0;
  p.dropout_seed = static_cast<int64_t>(r.next() >> 2), p.dropout_offset = static_cast<int64_t>(r.next() >> 2);
  p.num_threads = 2, p.parallel_for = parallel_for;

  problem->query = random_rows(r, dtype, p.B, p.H, p.Lq, p.D);
  problem->key = random_rows(r, dtype, p.B, p.Hkv, p.Lk, p.D);
  problem->value = random_rows(r, dtype, p.B, p.Hkv, p.Lk, p.Dv);
  problem->grad_out = random_rows(r, dtype, p.B, p.H, p.Lq, p.Dv);
  const DType lse_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
  auto mask_dtype = [&] { return r.chance(50) ? dtype : static_cast<DType>(r.below(3)); };
  if (r.chance(20)) problem->factors[0] = random_factors(r, p, mask_dtype(), false);
  else if (r.chance(50)) problem->multiplier = random_mask(r, p, mask_dtype(), false, false);
  if (r.chance(20)) {
    problem->factors[1] = random_factors(r, p, mask_dtype(), r.chance(50));
  } else if (r.chance(50)) {
    p.gate = r.chance(30);
    problem->bias = random_mask(r, p, mask_dtype(), p.gate, r.chance(50));
  }
  if (r.chance(25)) {
    const bool shared = r.chance(50);
    const int64_t B = shared ? 1 : p.B, H = shared ? 1 : p.H, n = B * H * p.Lq * p.Lk;
    problem->attn_mask.reset(new char[static_cast<size_t>(n)]);
    for (int64_t k = 0; k < n; ++k) problem->attn_mask[static_cast<size_t>(k)] = r.chance(80);
    p.attn_mask.data = problem->attn_mask.get();
    const int64_t stride[4] = {B == 1 ? 0 : H * p.Lq * p.Lk, H == 1 ? 0 : p.Lq * p.Lk, p.Lq == 1 ? 0 : p.Lk,
                               p.Lk == 1 ? 0 : 1};
    std::memcpy(p.attn_mask.stride, stride, sizeof stride);
  }
  if (r.chance(25)) {
    problem->key_mask.reset(new char[static_cast<size_t>(p.B * p.Lk)]);
    for (int64_t k = 0; k < p.B * p.Lk; ++k) problem->key_mask[static_cast<size_t>(k)] = r.chance(80);
    p.key_mask.data = problem->key_mask.get();
    p.key_mask.stride[0] = p.B == 1 ? 0 : p.Lk, p.key_mask.stride[3] = p.Lk == 1 ? 0 : 1;
  }
  if (r.chance(60)) {
    const int64_t n = r.chance(60) ? 1 : p.H;
    for (int64_t s = 0; s < n; ++s) problem->specs.push_back(random_spec(r, *problem));
  }
  p.n_patterns = static_cast<int64_t>(problem->specs.size());
  p.patterns = problem->specs.data(), p.segments = problem->segments.data();

  problem->out = make(dtype, p.B, p.H, p.Lq, p.Dv);
  problem->lse = make(lse_dtype, p.B, p.H, p.Lq, 1);
  // Results count every axis, also one of size 1.
  const int64_t out_strides[4] = {p.H * p.Lq * p.Dv, p.Lq * p.Dv, p.Dv, 1}, lse_strides[4] = {p.H * p.Lq, p.Lq, 1, 0};
  std::memcpy(problem->out.view.stride, out_strides, sizeof out_strides);
  std::memcpy(problem->lse.view.stride, lse_strides, sizeof lse_strides);
  if (r.chance(50)) {
    problem->grad_lse = make(lse_dtype, p.B, p.H, p.Lq, 1);
    for_each(problem->grad_lse.shape,
             [&](auto... at) { problem->grad_lse.set(static_cast<double>(r.below(65) - 32) / 64, at...); });
  }
  auto wanted = [&](const Operand& o, bool rows) {
    return o.memory && r.chance(85) ? gradient_of(o, rows) : Operand();
  };
  problem->grad_query = wanted(problem->query, true);
  problem->grad_key = wanted(problem->key, true);
  problem->grad_value = wanted(problem->value, true);
  problem->grad_multiplier = wanted(problem->multiplier, false);
  problem->grad_bias = wanted(problem->bias, false);
  for (int k = 0; k < 2; ++k) {
    const FactorOperands& f = problem->factors[k];
    if (!f.rows.memory) continue;
    problem->grad_factors[k] = {wanted(f.rows, true), wanted(f.columns, true), wanted(f.offset, false)};
    (k == 0 ? p.multiplier_factors : p.bias_factors) = f.view(f.rows.shape[3]);
  }

  p.query = problem->query.view, p.key = problem->key.view, p.value = problem->value.view;
  p.multiplier = problem->multiplier.view, p.bias = problem->bias.view;
  p.out = problem->out.view, p.lse = problem->lse.view;
  return problem;
}

// Sums whose terms may cancel, and the same sums of absolute values.
struct Sums {
  std::vector<double> values, sizes;
  void add(size_t at, double term, double size) { values[at] += term, sizes[at] += std::abs(size); }
};

struct Expected {
  std::vector<double> out, lse, query, key, value, multiplier, bias;
  Sums rows[2], columns[2], offset[2];
};

size_t flat(const Operand& o, int64_t b, int64_t h, int64_t i, int64_t j) {
  auto clip = [](int64_t index, int64_t size) { return size == 1 ? 0 : index; };
  return static_cast<size_t>(((clip(b, o.shape[0]) * o.shape[1] + clip(h, o.shape[1])) * o.shape[2] +
                              clip(i, o.shape[2])) * o.shape[3] + clip(j, o.shape[3]));
}

Expected reference(const Problem& x) {
  const lam::MaskedAttentionParams& p = x.p;
  Expected e;
  auto zeros = [](const Operand& o) { return std::vector<double>(static_cast<size_t>(o.memory ? o.elements() : 0)); };
  e.out = zeros(x.out), e.lse = zeros(x.lse), e.query = zeros(x.query), e.key = zeros(x.key);
  e.value = zeros(x.value), e.multiplier = zeros(x.multiplier), e.bias = zeros(x.bias);
  for (int k = 0; k < 2; ++k) {
    const FactorOperands& f = x.factors[k];
    e.rows[k] = {zeros(f.rows), zeros(f.rows)}, e.columns[k] = {zeros(f.columns), zeros(f.columns)};
    e.offset[k] = {zeros(f.offset), zeros(f.offset)};
  }
  auto mask_at = [](const Operand& dense, const FactorOperands& f, int64_t b, int64_t h, int64_t i, int64_t j,
                    double absent) {
    return f.rows.memory ? f.get(b, h, i, j) : dense.memory ? dense.get(b, h, i, j) : absent;
  };
  auto fold = [&](int k, double g, double size, int64_t b, int64_t h, int64_t i, int64_t j) {
    const FactorOperands& f = x.factors[k];
    if (!f.rows.memory) return;
    for (int64_t d = 0; d < f.rows.shape[3]; ++d) {
      const double row = f.rows.get(b, h, i, d), column = f.columns.get(b, h, j, d);
      e.rows[k].add(flat(f.rows, b, h, i, d), g * column, size * column);
      e.columns[k].add(flat(f.columns, b, h, j, d), g * row, size * row);
    }
    if (f.offset.memory) e.offset[k].add(flat(f.offset, b, h, 0, j), g, size);
  };
  const auto n = static_cast<size_t>(p.Lk);
  std::vector<double> dot(n), score(n), factor(n), bias(n), grad(n), grad_size(n), keep(n);
  std::vector<bool> seen(n);
  const uint32_t threshold = lam::dropout_threshold(p.dropout_p);
  auto masked = [](const View& v, int64_t b, int64_t h, int64_t i, int64_t j) {
    return v.data && !static_cast<const char*>(v.data)[b * v.stride[0] + h * v.stride[1] + i * v.stride[2] +
                                                       j * v.stride[3]];
  };
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t i = 0; i < p.Lq; ++i) {
        const int64_t g = h / (p.H / p.Hkv);
        double top = -INFINITY, sum = 0;
        for (int64_t j = 0; j < p.Lk; ++j) {
          const auto c = static_cast<size_t>(j);
          dot[c] = 0;
          for (int64_t d = 0; d < p.D; ++d) dot[c] += p.scale * x.query.get(b, h, i, d) * x.key.get(b, g, j, d);
          factor[c] = mask_at(x.multiplier, x.factors[0], b, h, i, j, 1);
          bias[c] = mask_at(x.bias, x.factors[1], b, h, i, j, 0);
          const lam::PatternSpec everything{};
          const lam::PatternSpec& spec =
              p.n_patterns == 0 ? everything : x.specs[p.n_patterns == 1 ? 0 : static_cast<size_t>(h)];
          seen[c] = lam::visible(spec, p.segments, b, i, j, p.Lq, p.Lk) && !masked(p.attn_mask, b, h, i, j) &&
                    !masked(p.key_mask, b, 0, 0, j) && !(!p.gate && bias[c] == -INFINITY);
          score[c] = dot[c] * factor[c] + (p.gate ? 0 : bias[c]);
          const double weight = p.gate ? bias[c] : 1;
          if (seen[c] && weight > 0) top = std::max(top, score[c] + std::log(weight));
          keep[c] = 1;
          if (p.dropout_p > 0) {
            const lam::Philox4 word = lam::philox4x32_10(
                static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(b * p.H + h),
                static_cast<uint32_t>(p.dropout_offset), static_cast<uint32_t>(p.dropout_seed),
                static_cast<uint32_t>(static_cast<uint64_t>(p.dropout_seed) >> 32));
            keep[c] = word.word[j % 4] >= threshold ? 1 / (1 - p.dropout_p) : 0;
          }
        }
        for (size_t c = 0; c < n; ++c)
          if (seen[c]) sum += (p.gate ? bias[c] : 1) * std::exp(score[c] - top);
        const double lse = top == -INFINITY ? -INFINITY : top + std::log(sum);
        e.lse[flat(x.lse, b, h, i, 0)] = lse;
        if (lse == -INFINITY) continue;
        double delta = 0, delta_size = 0;
        for (int64_t j = 0; j < p.Lk; ++j) {
          const auto c = static_cast<size_t>(j);
          if (!seen[c]) continue;
          const double prob = (p.gate ? bias[c] : 1) * std::exp(score[c] - lse);
          grad[c] = grad_size[c] = 0;
          for (int64_t d = 0; d < p.Dv; ++d) {
            const double v = x.value.get(b, g, j, d), go = x.grad_out.get(b, h, i, d);
            e.out[flat(x.out, b, h, i, d)] += prob * keep[c] * v;
            e.value[flat(x.value, b, g, j, d)] += prob * keep[c] * go;
            grad[c] += keep[c] * v * go;
            grad_size[c] += std::abs(keep[c] * v * go);
          }
          delta += prob * grad[c];
          delta_size += prob * grad_size[c];
        }
        const double grad_lse = x.grad_lse.memory ? x.grad_lse.get(b, h, i, 0) : 0, shift = grad_lse - delta;
        for (int64_t j = 0; j < p.Lk; ++j) {
          const auto c = static_cast<size_t>(j);
          if (!seen[c]) continue;
          const double weightless = std::exp(score[c] - lse) * (grad[c] + shift);
          const double prob = (p.gate ? bias[c] : 1) * std::exp(score[c] - lse);
          const double ds = prob * (grad[c] + shift);
          const double ds_size = prob * (grad_size[c] + std::abs(grad_lse) + delta_size);
          if (x.bias.memory) e.bias[flat(x.bias, b, h, i, j)] += p.gate ? weightless : ds;
          if (x.multiplier.memory) e.multiplier[flat(x.multiplier, b, h, i, j)] += ds * dot[c];
          fold(0, ds * dot[c], ds_size * dot[c], b, h, i, j);
          fold(1, ds, ds_size, b, h, i, j);
          for (int64_t d = 0; d < p.D; ++d) {
            e.query[flat(x.query, b, h, i, d)] += p.scale * ds * factor[c] * x.key.get(b, g, j, d);
            e.key[flat(x.key, b, g, j, d)] += p.scale * ds * factor[c] * x.query.get(b, h, i, d);
          }
        }
      }
  return e;
}

// Coarse on purpose: the accuracy tests are elsewhere; this finds values that come from the wrong place.
bool close(const char* what, const Operand& got, const std::vector<double>& expected, double roundoff,
           const std::vector<double>& sizes) {
  if (!got.memory) return true;
  double largest = 1;
  for (const double value : sizes)
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  // 2^-40: a sum of thousands of terms that cancel
  const double bound = 32 * std::max(roundoff + unit_roundoff(got.view.dtype), 0x1p-40) * largest;
  bool good = true;
  for_each(got.shape, [&](auto... at) {
    const double want = expected[flat(got, at...)], have = got.get(at...);
    if (have == want || std::abs(have - want) <= bound || !good) return;
    good = false;
    const int64_t index[4] = {at...};
    std::printf("  %s[%ld, %ld, %ld, %ld] is %g, expected %g (bound %g)\n", what, static_cast<long>(index[0]),
                static_cast<long>(index[1]), static_cast<long>(index[2]), static_cast<long>(index[3]), have, want,
                bound);
  });
  return good;
}

bool close(const char* what, const Operand& got, const std::vector<double>& expected, double roundoff) {
  return close(what, got, expected, roundoff, expected);
}
bool close(const char* what, const Operand& got, const Sums& expected, double roundoff) {
  return close(what, got, expected.values, roundoff, expected.sizes);
}

Random generator_of(int64_t number) {
  Random r{0x9E3779B97F4A7C15ull * static_cast<uint64_t>(number + 1)};
  for (int k = 0; k < 8; ++k) r.next();
  return r;
}

void announce(const char* where, DType dtype, int64_t number, const lam::MaskedAttentionParams& p) {
  std::printf("%s %s %ld: B%ld H%ld/%ld Lq%ld Lk%ld D%ld Dv%ld%s%s%s%s\n", where, name_of(dtype),
              static_cast<long>(number), static_cast<long>(p.B), static_cast<long>(p.H), static_cast<long>(p.Hkv),
              static_cast<long>(p.Lq), static_cast<long>(p.Lk), static_cast<long>(p.D), static_cast<long>(p.Dv),
              p.multiplier.data ? " multiplier" : p.multiplier_factors.rank ? " low-rank multiplier" : "",
              p.bias.data ? (p.gate ? " gate" : " bias") : p.bias_factors.rank ? " low-rank bias" : "",
              p.n_patterns ? " pattern" : "", p.dropout_p > 0 ? " dropout" : "");
  std::fflush(stdout);
}

void set_gradients(Problem& problem) {
  Problem* x = &problem;
  lam::MaskedAttentionParams& p = x->p;
  p.grad_out = x->grad_out.view, p.grad_lse = x->grad_lse.view;
  p.grad_query = x->grad_query.view, p.grad_key = x->grad_key.view, p.grad_value = x->grad_value.view;
  p.grad_multiplier = x->grad_multiplier.view, p.grad_bias = x->grad_bias.view;
  p.grad_multiplier_factors = x->grad_factors[0].view(p.multiplier_factors.rank);
  p.grad_bias_factors = x->grad_factors[1].view(p.bias_factors.rank);
}

bool all_close(const Problem& problem, DType dtype) {
  const Problem* x = &problem;
  const Expected e = reference(*x);
  const double u = unit_roundoff(dtype);
  const bool good[] = {close("out", x->out, e.out, u),
                       close("lse", x->lse, e.lse, u),
                       close("grad_query", x->grad_query, e.query, u),
                       close("grad_key", x->grad_key, e.key, u),
                       close("grad_value", x->grad_value, e.value, u),
                       close("grad_multiplier", x->grad_multiplier, e.multiplier, u),
                       close("grad_bias", x->grad_bias, e.bias, u),
                       close("grad_multiplier_rows", x->grad_factors[0].rows, e.rows[0], u),
                       close("grad_multiplier_columns", x->grad_factors[0].columns, e.columns[0], u),
                       close("grad_multiplier_offset", x->grad_factors[0].offset, e.offset[0], u),
                       close("grad_bias_rows", x->grad_factors[1].rows, e.rows[1], u),
                       close("grad_bias_columns", x->grad_factors[1].columns, e.columns[1], u),
                       close("grad_bias_offset", x->grad_factors[1].offset, e.offset[1], u)};
  for (const bool each : good)
    if (!each) return false;
  return true;
}

}  // namespace
