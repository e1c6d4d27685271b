// masked_attention as private torch operators, by torch's stable ABI: of the CPU kernels, and with LAM_CUDA_KERNELS of
// the CUDA kernels, on a GPU or emulated.
#include "bind_call.h"
#if defined(LAM_CUDA_KERNELS)
#include "bind_cuda.h"
#define LAM_OP(direction) "masked_attention_cuda_" direction
#else
#define LAM_OP(direction) "masked_attention_cpu_" direction
#endif

namespace {

#if defined(LAM_CUDA_KERNELS)
constexpr CudaKernels<lam::MaskedAttentionParams> kKernels{
    "masked_attention", lam::cuda::masked_attention_forward, lam::cuda::masked_attention_backward,
    lam::cuda::masked_attention_backward_bytes};
#else
constexpr CpuKernels<lam::MaskedAttentionParams> kKernels{&lam::LevelKernels::masked_attention_fwd,
                                                          &lam::LevelKernels::masked_attention_bwd};
#endif

std::tuple<Tensor, Tensor> masked_attention_fwd(
    Tensor query, Tensor key, Tensor value, OptionalTensor multiplier, OptionalTensor bias,
    OptionalTensor multiplier_columns, OptionalTensor multiplier_offset, OptionalTensor bias_columns,
    OptionalTensor bias_offset, OptionalTensor attn_mask, OptionalTensor key_mask, std::vector<Tensor> segment_ids,
    OptionalTensor rng_state, std::vector<int64_t> pattern, double scale, double dropout_p, bool gate) {
  Call call(query, key, value, {multiplier, multiplier_columns, multiplier_offset}, {bias, bias_columns, bias_offset},
            attn_mask, key_mask, segment_ids, rng_state, pattern, scale, dropout_p, gate);
  lam::MaskedAttentionParams& p = call.p;
  kKernels.check_limits(p);
  const Shape out_shape{p.B, p.H, p.Lq, p.Dv}, lse_shape{p.B, p.H, p.Lq};
  Tensor out = allocate(query, out_shape);
  Tensor lse = allocate(query, lse_shape, call.lse_dtype());
  if (call.no_pairs()) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  p.out = result_view(out, p.query.dtype);
  p.lse = result_view(lse, call.lse_kernel_dtype());
  kKernels.run_forward(p, query);
  return {out, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients masked_attention_bwd(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, OptionalTensor multiplier,
    OptionalTensor bias, OptionalTensor multiplier_columns, OptionalTensor multiplier_offset,
    OptionalTensor bias_columns, OptionalTensor bias_offset, OptionalTensor attn_mask, OptionalTensor key_mask,
    std::vector<Tensor> segment_ids, OptionalTensor rng_state, Tensor out, Tensor lse, std::vector<int64_t> pattern,
    double scale, double dropout_p, bool gate, std::vector<bool> needs) {
  Call call(query, key, value, {multiplier, multiplier_columns, multiplier_offset}, {bias, bias_columns, bias_offset},
            attn_mask, key_mask, segment_ids, rng_state, pattern, scale, dropout_p, gate);
  lam::MaskedAttentionParams& p = call.p;
  kKernels.check_limits(p);
  check_needs(needs, 9);
  const ResultGradient result(call, grad_out, out, lse);
  if (grad_lse) {
    check_tensor(*grad_lse, "grad_lse", {p.B, p.H, p.Lq});
    STD_TORCH_CHECK(grad_lse->scalar_type() == call.lse_dtype(), "grad_lse must have the dtype of lse");
    grad_lse = as_contiguous(*grad_lse);
  }

  const bool zeros = call.no_pairs();
  auto [grad_query, grad_key, grad_value] = allocate_row_gradients(p, query, key, value, needs, zeros);
  auto mask_gradient = [&](const OptionalTensor& operand, bool want, const lam::View& like, lam::View& v) {
    return allocate_gradient(operand, query, want, zeros, like.dtype, v);
  };
  lam::Factors &dm = p.grad_multiplier_factors, &db = p.grad_bias_factors;
  const lam::Factors &m = p.multiplier_factors, &a = p.bias_factors;
  const bool low_m = m.rank > 0, low_a = a.rank > 0;
  dm.rank = m.rank, db.rank = a.rank;
  Tensor grad_multiplier = mask_gradient(multiplier, needs[3], low_m ? m.rows : p.multiplier, low_m ? dm.rows : p.grad_multiplier);
  Tensor grad_bias = mask_gradient(bias, needs[4], low_a ? a.rows : p.bias, low_a ? db.rows : p.grad_bias);
  Tensor grad_multiplier_columns = mask_gradient(multiplier_columns, needs[5], m.columns, dm.columns);
  Tensor grad_multiplier_offset = mask_gradient(multiplier_offset, needs[6], m.offset, dm.offset);
  Tensor grad_bias_columns = mask_gradient(bias_columns, needs[7], a.columns, db.columns);
  Tensor grad_bias_offset = mask_gradient(bias_offset, needs[8], a.offset, db.offset);

  if (!zeros && wanted(needs)) {
    result.fill(p);
    if (grad_lse) p.grad_lse = view(input_data(*grad_lse), call.lse_kernel_dtype(), *grad_lse);
    kKernels.run_backward(p, query);
  }
  return {grad_query, grad_key, grad_value, grad_multiplier, grad_bias, grad_multiplier_columns, grad_multiplier_offset,
          grad_bias_columns, grad_bias_offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lam_kernels, m) {
  m.def(
      LAM_OP("fwd") "(Tensor query, Tensor key, Tensor value, Tensor? multiplier, Tensor? bias, "
      "Tensor? multiplier_columns, Tensor? multiplier_offset, Tensor? bias_columns, Tensor? bias_offset, "
      "Tensor? attn_mask, Tensor? key_mask, Tensor[] segment_ids, Tensor? rng_state, int[] pattern, float scale, "
      "float dropout_p, bool gate) -> (Tensor, Tensor)");
  m.def(
      LAM_OP("bwd") "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor? multiplier, Tensor? bias, Tensor? multiplier_columns, Tensor? multiplier_offset, "
      "Tensor? bias_columns, Tensor? bias_offset, Tensor? attn_mask, Tensor? key_mask, Tensor[] segment_ids, "
      "Tensor? rng_state, Tensor out, Tensor lse, int[] pattern, float scale, float dropout_p, bool gate, "
      "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#if defined(LAM_ON_GPU)
STABLE_TORCH_LIBRARY_IMPL(lam_kernels, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(lam_kernels, CPU, m) {
#endif
  m.impl(LAM_OP("fwd"), TORCH_BOX(&masked_attention_fwd));
  m.impl(LAM_OP("bwd"), TORCH_BOX(&masked_attention_bwd));
}
