// Problems of the ops beside masked_attention, made of one of its own: see random_problem.h.
#pragma once
#include "random_problem.h"

namespace {

// Results and gradients of an op beside masked_attention's own, in blocks of their own.
struct Half {
  Operand out, lse, grad_out;
  void enter(lam::MaskedAttentionParams& p) { p.out = out.view, p.lse = lse.view, p.grad_out = grad_out.view; }
};
Half make_half(Random& r, const lam::MaskedAttentionParams& p) {
  Half half{make(p.query.dtype, p.B, p.H, p.Lq, p.Dv), make(p.lse.dtype, p.B, p.H, p.Lq, 1),
            random_rows(r, p.query.dtype, p.B, p.H, p.Lq, p.Dv)};
  const int64_t out[4] = {p.H * p.Lq * p.Dv, p.Lq * p.Dv, p.Dv, 1}, lse[4] = {p.H * p.Lq, p.Lq, 1, 0};
  std::memcpy(half.out.view.stride, out, sizeof out);
  std::memcpy(half.lse.view.stride, lse, sizeof lse);
  return half;
}

bool same_numbers(const Operand& one, const Operand& other, double tolerance) {
  bool same = true;
  for_each(one.shape, [&](auto... at) {
    const double a = one.get(at...), b = other.get(at...);
    if (!(std::abs(a - b) <= tolerance * (1 + std::abs(b)))) same = false;
  });
  return same;
}

// global_local_attention of a problem's operands; the local half is the problem itself, whose result can be checked.
struct TwoMapProblem {
  Half whole, near;
  lam::GlobalLocalAttentionParams p{};

  static bool takes(const lam::MaskedAttentionParams& base) {
    return base.H == base.Hkv && !base.gate && base.dropout_p == 0 && base.attn_mask.data == nullptr &&
           base.multiplier_factors.rank == 0 && base.bias_factors.rank == 0;
  }
  // After set_gradients(x).
  TwoMapProblem(Random& r, Problem& x) : whole(make_half(r, x.p)), near(make_half(r, x.p)) {
    x.p.grad_lse = {};
    static_cast<lam::MaskedAttentionParams&>(p) = x.p;
    p.n_patterns = 0, p.patterns = nullptr;
    p.local = x.p;
    whole.enter(p), near.enter(p.local);
  }
  bool local_half_is(const Operand& out, DType dtype) const {
    const double tolerance = dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 1e-4 : 0.03;
    return same_numbers(near.out, out, tolerance) || (std::puts("the local half differs"), false);
  }
};

// map_gated_attention of a problem's operands.
struct GatedProblem {
  Half half;
  Operand gates[2], grads[2];
  lam::MapGatedAttentionParams p{};

  static bool takes(const lam::MaskedAttentionParams& base) {
    return base.H == base.Hkv && base.Lq == base.Lk && base.Lq <= 512;
  }
  // After set_gradients(x).
  GatedProblem(Random& r, const Problem& x, bool renormalise) : half(make_half(r, x.p)) {
    static_cast<lam::MaskedAttentionParams&>(p) = x.p;
    half.enter(p);
    for (int k = 0; k < 2; ++k) {
      gates[k] = random_rows(r, p.query.dtype, 1, 1, p.Lq, p.Lq);
      const int64_t strides[4] = {0, 0, p.Lq, 1};
      grads[k] = make(p.query.dtype, 1, 1, p.Lq, p.Lq);
      std::memcpy(grads[k].view.stride, strides, sizeof strides);
    }
    p.gate_global = gates[0].view, p.gate_local = gates[1].view;
    p.grad_gate_global = grads[0].view, p.grad_gate_local = grads[1].view;
    p.renormalise = renormalise;
  }
  bool all_written() const {  // and no NaN
    return same_numbers(half.out, half.out, 0) && same_numbers(grads[0], grads[0], 0) &&
           same_numbers(grads[1], grads[1], 0);
  }
};

}  // namespace
