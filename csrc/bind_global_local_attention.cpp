// global_local_attention as private torch operators, by torch's stable ABI: of the CPU kernels, and with
// LAM_CUDA_KERNELS of the CUDA kernels, on a GPU or emulated.
#include "bind_call.h"
#if defined(LAM_CUDA_KERNELS)
#include "bind_cuda.h"
#define LAM_OP(direction) "global_local_attention_cuda_" direction
#else
#define LAM_OP(direction) "global_local_attention_cpu_" direction
#endif

namespace {

#if defined(LAM_CUDA_KERNELS)
constexpr CudaKernels<lam::GlobalLocalAttentionParams> kKernels{
    "global_local_attention", lam::cuda::global_local_attention_forward, lam::cuda::global_local_attention_backward,
    lam::cuda::global_local_attention_backward_bytes};
#else
constexpr CpuKernels<lam::GlobalLocalAttentionParams> kKernels{&lam::LevelKernels::global_local_attention_fwd,
                                                               &lam::LevelKernels::global_local_attention_bwd};
#endif

lam::GlobalLocalAttentionParams halves_of(const Call& call) {
  lam::GlobalLocalAttentionParams p{};
  static_cast<lam::MaskedAttentionParams&>(p) = call.p;
  p.n_patterns = 0;
  p.patterns = nullptr;
  p.local = call.p;
  return p;
}

Call make_call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& multiplier,
               const OptionalTensor& bias, const OptionalTensor& key_mask, const std::vector<Tensor>& segment_ids,
               const std::vector<int64_t>& pattern, double scale) {
  return Call(query, key, value, {multiplier, {}, {}}, {bias, {}, {}}, std::nullopt, key_mask, segment_ids, std::nullopt, pattern, scale, 0.0,
              false);
}

void check_sizes(const lam::MaskedAttentionParams& p) {
  STD_TORCH_CHECK(p.H == p.Hkv, "key and value must have query's ", p.H, " heads, have ", p.Hkv);
  kKernels.check_limits(p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> global_local_attention_fwd(
    Tensor query, Tensor key, Tensor value, OptionalTensor multiplier, OptionalTensor bias, OptionalTensor key_mask,
    std::vector<Tensor> segment_ids, std::vector<int64_t> pattern, double scale) {
  const Call call = make_call(query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale);
  check_sizes(call.p);
  lam::GlobalLocalAttentionParams p = halves_of(call);
  const Shape out_shape{p.B, p.H, p.Lq, p.Dv}, lse_shape{p.B, p.H, p.Lq};
  Tensor global_out = allocate(query, out_shape), local_out = allocate(query, out_shape);
  Tensor global_lse = allocate(query, lse_shape, call.lse_dtype()), local_lse = allocate(query, lse_shape, call.lse_dtype());
  if (call.no_pairs()) {
    for (Tensor* out : {&global_out, &local_out}) torch::stable::zero_(*out);
    for (Tensor* lse : {&global_lse, &local_lse})
      torch::stable::fill_(*lse, -std::numeric_limits<double>::infinity());
    return {global_out, local_out, global_lse, local_lse};
  }
  p.out = result_view(global_out, p.query.dtype);
  p.lse = result_view(global_lse, call.lse_kernel_dtype());
  p.local.out = result_view(local_out, p.query.dtype);
  p.local.lse = result_view(local_lse, call.lse_kernel_dtype());
  kKernels.run_forward(p, query);
  return {global_out, local_out, global_lse, local_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> global_local_attention_bwd(
    Tensor grad_global, Tensor grad_local, Tensor query, Tensor key, Tensor value, OptionalTensor multiplier,
    OptionalTensor bias, OptionalTensor key_mask, std::vector<Tensor> segment_ids, Tensor global_out, Tensor local_out,
    Tensor global_lse, Tensor local_lse, std::vector<int64_t> pattern, double scale, std::vector<bool> needs) {
  const Call call = make_call(query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale);
  check_sizes(call.p);
  lam::GlobalLocalAttentionParams p = halves_of(call);
  const ResultGradient global_half(call, grad_global, global_out, global_lse),
      local_half(call, grad_local, local_out, local_lse);
  check_needs(needs, 5);
  const bool zeros = call.no_pairs();
  auto [grad_query, grad_key, grad_value] = allocate_row_gradients(p, query, key, value, needs, zeros);
  Tensor grad_multiplier = allocate_gradient(multiplier, query, needs[3], zeros, p.multiplier.dtype, p.grad_multiplier);
  Tensor grad_bias = allocate_gradient(bias, query, needs[4], zeros, p.bias.dtype, p.grad_bias);
  if (!zeros && wanted(needs)) {
    global_half.fill(p);
    local_half.fill(p.local);
    kKernels.run_backward(p, query);
  }
  return {grad_query, grad_key, grad_value, grad_multiplier, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lam_kernels, m) {
  m.def(
      LAM_OP("fwd") "(Tensor query, Tensor key, Tensor value, Tensor? multiplier, Tensor? bias, "
      "Tensor? key_mask, Tensor[] segment_ids, int[] pattern, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      LAM_OP("bwd") "(Tensor grad_global, Tensor grad_local, Tensor query, Tensor key, Tensor value, "
      "Tensor? multiplier, Tensor? bias, Tensor? key_mask, Tensor[] segment_ids, Tensor global_out, Tensor local_out, "
      "Tensor global_lse, Tensor local_lse, int[] pattern, float scale, bool[] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#if defined(LAM_ON_GPU)
STABLE_TORCH_LIBRARY_IMPL(lam_kernels, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(lam_kernels, CPU, m) {
#endif
  m.impl(LAM_OP("fwd"), TORCH_BOX(&global_local_attention_fwd));
  m.impl(LAM_OP("bwd"), TORCH_BOX(&global_local_attention_bwd));
}
