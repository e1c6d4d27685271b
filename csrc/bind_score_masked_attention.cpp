// score_masked_attention as private torch operators, by torch's stable ABI.
#include "bind_call.h"

namespace {

constexpr int64_t kMostKeys = 128;

struct ScoreCall : Call {
  lam::ScoreMaskedAttentionParams params{};
  std::vector<int64_t> widths;
  Tensor parameters;

  ScoreCall(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& parameters_in,
            const OptionalTensor& key_mask, const std::vector<int64_t>& widths_in, double scale, bool multiply, bool mean)
      : Call(query, key, value, {}, {}, std::nullopt, key_mask, {}, std::nullopt, {}, scale, 0.0, false),
        widths(widths_in),
        parameters(parameters_in) {
    static_cast<lam::MaskedAttentionParams&>(params) = p;
    STD_TORCH_CHECK(p.H == p.Hkv, "key and value must have query's ", p.H, " heads, have ", p.Hkv);
    STD_TORCH_CHECK(p.Lk <= kMostKeys, "at most ", kMostKeys, " keys, got ", p.Lk);
    params.layers = static_cast<int64_t>(widths.size()) - 1;
    STD_TORCH_CHECK(params.layers >= 1 && params.layers <= lam::kMaxScoreLayers, "widths must describe 1 to ",
                    lam::kMaxScoreLayers, " layers");
    STD_TORCH_CHECK(widths.front() == p.Lk && widths.back() == p.Lk, "the network must map ", p.Lk, " scores to ", p.Lk);
    int64_t expected = 0, operations = 0;
    for (size_t l = 1; l < widths.size(); ++l) {
      STD_TORCH_CHECK((widths[l] >= 1 || widths[l] == p.Lk) && widths[l] <= kMostWidth, "a layer has width ", widths[l]);
      expected += (widths[l - 1] + 1) * widths[l];
      operations += widths[l - 1] * widths[l];
    }
    check_tensor(parameters, "parameters", {expected});
    STD_TORCH_CHECK(parameters.scalar_type() == lse_dtype(), "parameters must be float32, or float64 if query is");
    parameters = as_contiguous(parameters);
    params.widths = widths.data();
    params.parameters = input_data(parameters);
    params.multiply = multiply, params.mean = mean;
    // Waking a second thread costs more than this many multiplications do.
    constexpr double kWorthAThread = 1 << 18;
    const double work = static_cast<double>(p.B * p.H * p.Lq) * static_cast<double>(operations + p.Lk * p.D);
    params.num_threads = work < kWorthAThread ? 1 : torch::stable::get_num_threads();
  }

 private:
  static constexpr int64_t kMostWidth = int64_t{1} << 20;
};

Tensor score_masked_attention_cpu_fwd(Tensor query, Tensor key, Tensor value, Tensor parameters, OptionalTensor key_mask,
                                      std::vector<int64_t> widths, double scale, bool multiply, bool mean) {
  ScoreCall call(query, key, value, parameters, key_mask, widths, scale, multiply, mean);
  lam::ScoreMaskedAttentionParams& p = call.params;
  const Shape out_shape{p.B, p.H, p.Lq, p.Dv};
  Tensor out = allocate(query, out_shape);
  if (call.no_pairs()) {
    torch::stable::zero_(out);
    return out;
  }
  p.out = result_view(out, p.query.dtype);
  run_kernel(lam::kernels(p.query.dtype).score_masked_attention_fwd, p);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> score_masked_attention_cpu_bwd(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor parameters, OptionalTensor key_mask,
    std::vector<int64_t> widths, double scale, bool multiply, bool mean, std::vector<bool> needs) {
  ScoreCall call(query, key, value, parameters, key_mask, widths, scale, multiply, mean);
  lam::ScoreMaskedAttentionParams& p = call.params;
  check_needs(needs, 4);
  check_tensor(grad_out, "grad_out", {p.B, p.H, p.Lq, p.Dv});
  STD_TORCH_CHECK(grad_out.scalar_type() == query.scalar_type(), "grad_out must have query's dtype");
  grad_out = with_unit_last_stride(grad_out);
  const bool zeros = call.no_pairs();
  const lam::DType dtype = p.query.dtype;
  lam::View parameter_view;
  auto [grad_query, grad_key, grad_value] = allocate_row_gradients(p, query, key, value, needs, zeros);
  Tensor grad_parameters = allocate_gradient(call.parameters, needs[3], zeros, call.lse_kernel_dtype(), parameter_view);
  p.grad_parameters = parameter_view.data;
  if (!zeros && wanted(needs)) {
    p.grad_out = row_view(grad_out, dtype);
    run_kernel(lam::kernels(dtype).score_masked_attention_bwd, p);
  }
  return {grad_query, grad_key, grad_value, grad_parameters};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lam_kernels, m) {
  m.def(
      "score_masked_attention_cpu_fwd(Tensor query, Tensor key, Tensor value, Tensor parameters, Tensor? key_mask, "
      "int[] widths, float scale, bool multiply, bool mean) -> Tensor");
  m.def(
      "score_masked_attention_cpu_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor parameters, "
      "Tensor? key_mask, int[] widths, float scale, bool multiply, bool mean, bool[] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lam_kernels, CPU, m) {
  m.impl("score_masked_attention_cpu_fwd", TORCH_BOX(&score_masked_attention_cpu_fwd));
  m.impl("score_masked_attention_cpu_bwd", TORCH_BOX(&score_masked_attention_cpu_bwd));
}
