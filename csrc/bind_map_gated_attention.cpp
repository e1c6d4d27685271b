// map_gated_attention as private torch operators, by torch's stable ABI: of the CPU kernels, and with LAM_CUDA_KERNELS
// of the CUDA kernels, on a GPU or emulated.
#include "bind_call.h"
#if defined(LAM_CUDA_KERNELS)
#include "bind_cuda.h"
#include "cuda/map_gated_attention.h"
#define LAM_OP(direction) "map_gated_attention_cuda_" direction
#else
#define LAM_OP(direction) "map_gated_attention_cpu_" direction
#endif

namespace {

#if defined(LAM_CUDA_KERNELS)
constexpr CudaKernels<lam::MapGatedAttentionParams> kKernels{
    "map_gated_attention", lam::cuda::map_gated_attention_forward, lam::cuda::map_gated_attention_backward,
    lam::cuda::map_gated_attention_backward_bytes};
#else
constexpr CpuKernels<lam::MapGatedAttentionParams> kKernels{&lam::LevelKernels::map_gated_attention_fwd,
                                                            &lam::LevelKernels::map_gated_attention_bwd};
#endif

constexpr int64_t kMaxLength = 512;

lam::MapGatedAttentionParams params_of(const Call& call, const Tensor& gate_global, const Tensor& gate_local,
                                       bool renormalise) {
  lam::MapGatedAttentionParams p{};
  static_cast<lam::MaskedAttentionParams&>(p) = call.p;
  STD_TORCH_CHECK(p.H == p.Hkv, "key and value must have query's ", p.H, " heads, have ", p.Hkv);
  STD_TORCH_CHECK(p.Lq == p.Lk, "query and key must have one length, have ", p.Lq, " and ", p.Lk);
  STD_TORCH_CHECK(p.Lq <= kMaxLength, "at most ", kMaxLength, " positions, got ", p.Lq);
  kKernels.check_limits(p);
  auto gate_view = [&](const Tensor& gate, const char* name) {
    check_tensor(gate, name, {p.Lq, p.Lq});
    const lam::DType dtype = dtype_of(gate, name);
    STD_TORCH_CHECK(dtype != lam::DType::f64 || p.query.dtype == lam::DType::f64, name,
                    " may be float64 only if query is");
    return lam::View{input_data(gate), dtype, {0, 0, gate.stride(0), gate.stride(1)}};
  };
  p.gate_global = gate_view(gate_global, "gate_global");
  p.gate_local = gate_view(gate_local, "gate_local");
  p.renormalise = renormalise;
  return p;
}

Call make_call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_mask,
               const std::vector<Tensor>& segment_ids, const std::vector<int64_t>& pattern, double scale) {
  return Call(query, key, value, {}, {}, std::nullopt, key_mask, segment_ids, std::nullopt, pattern,
              scale, 0.0, false);
}

Tensor map_gated_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor gate_global, Tensor gate_local,
                                   OptionalTensor key_mask, std::vector<Tensor> segment_ids,
                                   std::vector<int64_t> pattern, double scale, bool renormalise) {
  const Call call = make_call(query, key, value, key_mask, segment_ids, pattern, scale);
  lam::MapGatedAttentionParams p = params_of(call, gate_global, gate_local, renormalise);
  const Shape out_shape{p.B, p.H, p.Lq, p.Dv};
  Tensor out = allocate(query, out_shape);
  if (call.no_pairs()) {
    torch::stable::zero_(out);
    return out;
  }
  p.out = result_view(out, p.query.dtype);
  kKernels.run_forward(p, query);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> map_gated_attention_bwd(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor gate_global, Tensor gate_local,
    OptionalTensor key_mask, std::vector<Tensor> segment_ids, std::vector<int64_t> pattern, double scale,
    bool renormalise, std::vector<bool> needs) {
  const Call call = make_call(query, key, value, key_mask, segment_ids, pattern, scale);
  lam::MapGatedAttentionParams p = params_of(call, gate_global, gate_local, renormalise);
  check_needs(needs, 5);
  const bool zeros = call.no_pairs();
  const lam::DType dtype = p.query.dtype;
  check_tensor(grad_out, "grad_out", {p.B, p.H, p.Lq, p.Dv});
  STD_TORCH_CHECK(grad_out.scalar_type() == query.scalar_type(), "grad_out must have query's dtype");
  grad_out = with_unit_last_stride(grad_out);
  auto [grad_query, grad_key, grad_value] = allocate_row_gradients(p, query, key, value, needs, zeros);
  Tensor grad_global = allocate_gradient(gate_global, needs[3], zeros, p.gate_global.dtype, p.grad_gate_global);
  Tensor grad_local = allocate_gradient(gate_local, needs[4], zeros, p.gate_local.dtype, p.grad_gate_local);
  if (!zeros && wanted(needs)) {
    p.grad_out = row_view(grad_out, dtype);
    kKernels.run_backward(p, query);
  }
  return {grad_query, grad_key, grad_value, grad_global, grad_local};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lam_kernels, m) {
  m.def(
      LAM_OP("fwd") "(Tensor query, Tensor key, Tensor value, Tensor gate_global, Tensor gate_local, "
      "Tensor? key_mask, Tensor[] segment_ids, int[] pattern, float scale, bool renormalise) -> Tensor");
  m.def(
      LAM_OP("bwd") "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor gate_global, "
      "Tensor gate_local, Tensor? key_mask, Tensor[] segment_ids, int[] pattern, float scale, bool renormalise, "
      "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#if defined(LAM_ON_GPU)
STABLE_TORCH_LIBRARY_IMPL(lam_kernels, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(lam_kernels, CPU, m) {
#endif
  m.impl(LAM_OP("fwd"), TORCH_BOX(&map_gated_attention_fwd));
  m.impl(LAM_OP("bwd"), TORCH_BOX(&map_gated_attention_bwd));
}
