// What the bindings of all C++ kernels share: tensors checked, results allocated, the plain parameter struct filled.
// The public op has checked everything in words a user understands; the checks here are what keeps a direct call of
// these private ops from reading outside of its tensors.
// LAM_CUDA_KERNELS: for the CUDA kernels (or their emulation); LAM_ON_GPU: whose tensors are on a GPU.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "lam.h"
#if !defined(LAM_CUDA_KERNELS)
#include "cpu/levels.h"
#include "cpu/scratch.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

#if defined(LAM_ON_GPU)
constexpr const char* kDevice = "CUDA";
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
#else
constexpr const char* kDevice = "CPU";
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
#endif

inline lam::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return lam::DType::f32;
    case ScalarType::BFloat16:
      return lam::DType::bf16;
    case ScalarType::Half:
      return lam::DType::f16;
    case ScalarType::Double:
      return lam::DType::f64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

// A size of -1 takes anything.
inline void check_tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, bool broadcast = false) {
  STD_TORCH_CHECK(t.defined() && on_device(t), name, " must be a ", kDevice, " tensor");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(), " axes, has ",
                  t.dim());
  const auto actual = t.sizes();
  size_t axis = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size == -1 || actual[axis] == size || (broadcast && actual[axis] == 1), name, ": axis ", axis,
                    " has size ", actual[axis], ", expected ", size);
    ++axis;
  }
  STD_TORCH_CHECK(t.numel() == 0 || t.const_data_ptr() != nullptr, name, " has no memory");
}

inline void check_scalar_type(const Tensor& t, const char* name, ScalarType expected, const char* expected_name) {
  STD_TORCH_CHECK(t.scalar_type() == expected, name, " must be ", expected_name);
}

// Kernels read their inputs through const access only; the struct has one pointer type for both directions.
inline void* input_data(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

inline int64_t stride_or_broadcast(const Tensor& t, int64_t axis) { return t.size(axis) == 1 ? 0 : t.stride(axis); }

// The one copy there is. An axis that repeats one row stays one row: row_view gives it a stride of 0 again.
inline Tensor with_unit_last_stride(Tensor t) {
  if (t.size(3) == 1 || t.stride(3) == 1) return t;
  for (int64_t axis = 0; axis < 3; ++axis)
    if (t.stride(axis) == 0 && t.size(axis) > 1) t = torch::stable::narrow(t, axis, 0, 1);
  return torch::stable::contiguous(t);
}

// A call of torch::stable::contiguous costs microseconds even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

#if defined(LAM_CUDA_KERNELS)
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}
#else
inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// A new contiguous tensor, contents undefined. A large one lives in memory that is kept from call to call: page faults
// of fresh memory would be a good part of it.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                std::optional<ScalarType> dtype = std::nullopt) {
  constexpr int64_t kKeptFromBytes = int64_t{1} << 20;
  const ScalarType type = dtype ? *dtype : like.scalar_type();
  int64_t numel = 1;
  Shape strides(sizes.size());
  for (size_t axis = sizes.size(); axis-- > 0; numel *= sizes[axis]) strides[axis] = numel;
  if (numel * bytes_of(type) >= kKeptFromBytes) {
    void* memory = lam::scratch_acquire(numel * bytes_of(type));
    STD_TORCH_CHECK(memory != nullptr, "out of memory: ", numel * bytes_of(type), " bytes for a result");
    return torch::stable::from_blob(memory, sizes, strides, like.device(), type, lam::scratch_release);
  }
  // torch::stable::new_empty looks its operator up by name, which takes longer than the allocation does
  int32_t dtype_code = 0;
  if (dtype) dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(),
                                                          static_cast<int64_t>(sizes.size()),
                                                          dtype ? &dtype_code : nullptr, nullptr, nullptr, 0, nullptr,
                                                          &handle));
  return Tensor(handle);
}
#endif

inline lam::View view(void* data, lam::DType dtype, const Tensor& t) {
  lam::View v{data, dtype, {0, 0, 0, 0}};
  for (int64_t axis = 0; axis < t.dim(); ++axis) v.stride[axis] = stride_or_broadcast(t, axis);
  return v;
}

inline lam::View row_view(const Tensor& t, lam::DType dtype) {  // query, key, value, grad_out
  lam::View v = view(input_data(t), dtype, t);
  v.stride[3] = 1;
  return v;
}

inline lam::View mask_view(const OptionalTensor& t, const char* name, const lam::MaskedAttentionParams& p) {
  if (!t) return {};
  check_tensor(*t, name, {p.B, p.H, p.Lq, p.Lk}, /*broadcast=*/true);
  const lam::DType dtype = dtype_of(*t, name);
  STD_TORCH_CHECK(dtype != lam::DType::f64 || p.query.dtype == lam::DType::f64, name,
                  " may be float64 only if query is");
  return view(input_data(*t), dtype, *t);
}

// A mask operand as a tensor, or as the factors of M = rows columns^T + offset: then `dense` holds the rows.
struct MaskOperand {
  OptionalTensor dense, columns, offset;
};

inline void check_factor(const Tensor& t, const char* name, const lam::MaskedAttentionParams& p, int64_t length, int64_t width) {
  check_tensor(t, name, {p.B, p.H, length, width}, /*broadcast=*/true);
  STD_TORCH_CHECK(t.size(2) == length && t.size(3) == width, name, ": the last two axes must be [", length, ", ", width,
                  "], are [", t.size(2), ", ", t.size(3), "]");
  STD_TORCH_CHECK(dtype_of(t, name) != lam::DType::f64 || p.query.dtype == lam::DType::f64, name,
                  " may be float64 only if query is");
}

// Fills the struct; the operand keeps what had to be copied.
inline void set_mask(MaskOperand& mask, const char* name, const lam::MaskedAttentionParams& p, lam::View& dense,
              lam::Factors& factors) {
  if (!mask.columns) {
    STD_TORCH_CHECK(!mask.offset, name, ": an offset needs columns");
    dense = mask_view(mask.dense, name, p);
    return;
  }
  STD_TORCH_CHECK(mask.dense.has_value(), name, ": columns need rows");
  STD_TORCH_CHECK(!p.gate, name, ": factors cannot be a gate");
  STD_TORCH_CHECK(mask.dense->dim() == 4, name, " must have 4 axes, has ", mask.dense->dim());
  const int64_t rank = mask.dense->size(3);
  STD_TORCH_CHECK(rank >= 1 && rank <= 256, name, ": rank must be 1 to 256, is ", rank);
  check_factor(*mask.dense, name, p, p.Lq, rank);
  check_factor(*mask.columns, name, p, p.Lk, rank);
  mask.dense = with_unit_last_stride(*mask.dense), mask.columns = with_unit_last_stride(*mask.columns);
  factors.rank = rank;
  factors.rows = row_view(*mask.dense, dtype_of(*mask.dense, name));
  factors.columns = row_view(*mask.columns, dtype_of(*mask.columns, name));
  if (mask.offset) {
    check_factor(*mask.offset, name, p, 1, p.Lk);
    factors.offset = view(input_data(*mask.offset), dtype_of(*mask.offset, name), *mask.offset);
  }
}

// Every axis counts, also one of size 1: a result is addressed as what it is, [B, H, L, ...] contiguous.
inline lam::View result_view(const Tensor& t, lam::DType dtype) {
  lam::View v{t.mutable_data_ptr(), dtype, {0, 0, 0, 0}};
  for (int64_t axis = 0; axis < t.dim(); ++axis) v.stride[axis] = t.stride(axis);
  return v;
}

inline std::vector<lam::SegmentIds> parse_segments(const std::vector<Tensor>& ids, const lam::MaskedAttentionParams& p) {
  STD_TORCH_CHECK(ids.size() % 2 == 0, "segment_ids must come in pairs of query and key ids");
  std::vector<lam::SegmentIds> segments;
  for (size_t s = 0; s < ids.size(); s += 2) {
    const Tensor &query = ids[s], &key = ids[s + 1];
    check_tensor(query, "segment_ids of queries", {-1, p.Lq});
    check_tensor(key, "segment_ids of keys", {-1, p.Lk});
    for (const Tensor* t : {&query, &key}) {
      STD_TORCH_CHECK(t->size(0) == p.B || t->size(0) == 1, "segment_ids: axis 0 must be the batch size or 1");
      check_scalar_type(*t, "segment_ids", ScalarType::Long, "int64");
    }
    segments.push_back({static_cast<const int64_t*>(query.const_data_ptr()),
                        static_cast<const int64_t*>(key.const_data_ptr()), stride_or_broadcast(query, 0),
                        stride_or_broadcast(query, 1), stride_or_broadcast(key, 0), stride_or_broadcast(key, 1)});
  }
  return segments;
}

// [] or n_specs followed by n_specs times (n_terms, 4 x (kind, end_aligned, a, b)).
inline std::vector<lam::PatternSpec> parse_patterns(const std::vector<int64_t>& ints, int64_t H, int64_t n_segments) {
  constexpr size_t kTermInts = 4, kSpecInts = 1 + kTermInts * lam::kMaxPatternTerms;
  if (ints.empty()) return {};
  const int64_t n_specs = ints[0];
  STD_TORCH_CHECK(n_specs == 1 || n_specs == H, "pattern: expected 1 or ", H, " specs, got ", n_specs);
  STD_TORCH_CHECK(ints.size() == 1 + static_cast<size_t>(n_specs) * kSpecInts, "pattern: ", ints.size(),
                  " integers do not hold ", n_specs, " specs");
  std::vector<lam::PatternSpec> specs(static_cast<size_t>(n_specs));
  const int64_t* at = ints.data() + 1;
  for (lam::PatternSpec& spec : specs) {
    STD_TORCH_CHECK(at[0] >= 0 && at[0] <= lam::kMaxPatternTerms, "pattern: a spec has ", at[0], " terms");
    spec.n_terms = static_cast<int32_t>(at[0]);
    for (int32_t t = 0; t < spec.n_terms; ++t) {
      const int64_t* term = at + 1 + kTermInts * static_cast<size_t>(t);
      const int64_t kind = term[0], a = term[2], b = term[3];
      STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(lam::PatternKind::segments), "pattern: no kind ", kind);
      STD_TORCH_CHECK(term[1] == 0 || term[1] == 1, "pattern: end_aligned must be 0 or 1, got ", term[1]);
      spec.terms[t] = {static_cast<lam::PatternKind>(kind), static_cast<int32_t>(term[1]), a, b};
      switch (spec.terms[t].kind) {
        case lam::PatternKind::block_diagonal:
          STD_TORCH_CHECK(a >= 1, "pattern: block must be at least 1, got ", a);
          break;
        case lam::PatternKind::dilated_toeplitz:
          STD_TORCH_CHECK(b >= 1, "pattern: dilation must be at least 1, got ", b);
          [[fallthrough]];
        case lam::PatternKind::toeplitz:
          STD_TORCH_CHECK(a >= 0, "pattern: radius must be at least 0, got ", a);
          break;
        case lam::PatternKind::segments:
          STD_TORCH_CHECK(a >= 0 && a < n_segments, "pattern: no pair of segment_ids ", a);
          break;
        case lam::PatternKind::causal:
          break;
      }
    }
    at += kSpecInts;
  }
  return specs;
}

#if defined(LAM_CUDA_KERNELS)
inline void check_ready() {}
inline void choose_threads(lam::MaskedAttentionParams&) {}
#else
inline void check_ready() { STD_TORCH_CHECK(*lam::level_error() == '\0', lam::level_error()); }

// A task of the kernel runs exactly once, on the lane of its own index if there is one: a kernel that asks for as many
// tasks as threads, several times, finds its data in the same core's cache. Further tasks go to whoever is free.
inline void parallel_for(int64_t n, void (*body)(void*, int64_t), void* ctx) {
  if (n <= 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t lanes = n < threads ? n : threads;
  if (lanes == 1) {
    for (int64_t task = 0; task < n; ++task) body(ctx, task);
    return;
  }
  std::atomic<int64_t> next{lanes};
  torch::stable::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) body(ctx, lane);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(ctx, task);
  });
}

inline void choose_threads(lam::MaskedAttentionParams& p) {
  // Waking a second thread costs more than this many multiplications do.
  constexpr double kWorthAThread = 1 << 18;
  const double work = static_cast<double>(p.B * p.H) * static_cast<double>(p.Lq) * static_cast<double>(p.Lk * p.D);
  p.num_threads = work < kWorthAThread ? 1 : torch::stable::get_num_threads();
  p.parallel_for = parallel_for;
}
#endif

// The operands that forward and backward share, checked, and what must outlive the kernel's call.
struct Call {
  lam::MaskedAttentionParams p{};
  Tensor query, key, value;
  MaskOperand multiplier, bias;
  std::vector<lam::SegmentIds> segments;
  std::vector<lam::PatternSpec> patterns;

  Call(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const MaskOperand& multiplier_in,
       const MaskOperand& bias_in, const OptionalTensor& attn_mask, const OptionalTensor& key_mask,
       const std::vector<Tensor>& segment_ids, const OptionalTensor& rng_state, const std::vector<int64_t>& pattern,
       double scale, double dropout_p, bool gate)
      : query(query_in), key(key_in), value(value_in), multiplier(multiplier_in), bias(bias_in) {
    check_ready();
    check_tensor(query, "query", {-1, -1, -1, -1});
    p.B = query.size(0), p.H = query.size(1), p.Lq = query.size(2), p.D = query.size(3);
    check_tensor(key, "key", {p.B, -1, -1, p.D});
    p.Hkv = key.size(1), p.Lk = key.size(2);
    check_tensor(value, "value", {p.B, p.Hkv, p.Lk, -1});
    p.Dv = value.size(3);
    STD_TORCH_CHECK(p.Hkv == 0 ? p.H == 0 : p.H % p.Hkv == 0, "query has ", p.H,
                    " heads, which is no multiple of the ", p.Hkv, " heads of key and value");
    STD_TORCH_CHECK(p.D >= 1 && p.D <= 256 && p.Dv >= 1 && p.Dv <= 256, "head dims must be 1 to 256, got ", p.D,
                    " and ", p.Dv);
    const lam::DType dtype = dtype_of(query, "query");
    STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                    "query, key and value must have one dtype");
    query = with_unit_last_stride(query), key = with_unit_last_stride(key), value = with_unit_last_stride(value);
    p.query = row_view(query, dtype), p.key = row_view(key, dtype), p.value = row_view(value, dtype);

    p.gate = gate;
    set_mask(multiplier, "multiplier", p, p.multiplier, p.multiplier_factors);
    set_mask(bias, "bias", p, p.bias, p.bias_factors);
    if (attn_mask) {
      check_tensor(*attn_mask, "attn_mask", {p.B, p.H, p.Lq, p.Lk}, /*broadcast=*/true);
      check_scalar_type(*attn_mask, "attn_mask", ScalarType::Bool, "bool");
      p.attn_mask = view(input_data(*attn_mask), lam::DType::f32, *attn_mask);
    }
    if (key_mask) {
      check_tensor(*key_mask, "key_mask", {p.B, p.Lk});
      check_scalar_type(*key_mask, "key_mask", ScalarType::Bool, "bool");
      p.key_mask.data = input_data(*key_mask);
      p.key_mask.stride[0] = stride_or_broadcast(*key_mask, 0);
      p.key_mask.stride[3] = stride_or_broadcast(*key_mask, 1);
    }

    segments = parse_segments(segment_ids, p);
    patterns = parse_patterns(pattern, p.H, static_cast<int64_t>(segments.size()));
    p.n_patterns = static_cast<int64_t>(patterns.size());
    p.patterns = patterns.data();
    p.segments = segments.data();

    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p must be in [0, 1), got ", dropout_p);
    if (dropout_p > 0.0) {
      STD_TORCH_CHECK(rng_state.has_value(), "dropout needs rng_state");
      STD_TORCH_CHECK(rng_state->is_cpu() && rng_state->dim() == 1 && rng_state->size(0) == 2,
                      "rng_state must be two integers on the CPU");
      check_scalar_type(*rng_state, "rng_state", ScalarType::Long, "int64");
      const auto* state = static_cast<const int64_t*>(rng_state->const_data_ptr());
      p.dropout_seed = state[0];
      p.dropout_offset = state[rng_state->stride(0)];
    }
    p.scale = scale;
    p.dropout_p = dropout_p;
    choose_threads(p);
  }

  Call(const Call&) = delete;  // p points into the vectors
  Call& operator=(const Call&) = delete;

  bool no_pairs() const { return p.B == 0 || p.H == 0 || p.Lq == 0 || p.Lk == 0; }
  ScalarType lse_dtype() const { return p.query.dtype == lam::DType::f64 ? ScalarType::Double : ScalarType::Float; }
  lam::DType lse_kernel_dtype() const {
    return p.query.dtype == lam::DType::f64 ? lam::DType::f64 : lam::DType::f32;
  }
};

template <class Kernel, class Params>
void run_kernel(Kernel kernel, const Params& p) {
  STD_TORCH_CHECK(kernel(p) == 0, "out of memory: the system has no scratch memory for this call");
}

#if !defined(LAM_CUDA_KERNELS)
// One op's kernels of the level in use; CudaKernels of bind_cuda.h is the same for the CUDA kernels.
template <class Params>
struct CpuKernels {
  using Kernel = int (*)(const Params&);
  Kernel lam::LevelKernels::*forward, lam::LevelKernels::*backward;

  void check_limits(const lam::MaskedAttentionParams&) const {}  // they take every call
  void run_forward(const Params& p, const Tensor&) const { run_kernel(lam::kernels(p.query.dtype).*forward, p); }
  void run_backward(const Params& p, const Tensor&) const { run_kernel(lam::kernels(p.query.dtype).*backward, p); }
};
#endif

// A gradient of the operand's shape to be filled in; empty when it is not wanted, zero when there is no pair.
inline Tensor allocate_gradient(const Tensor& operand, bool wanted, bool no_pairs, lam::DType dtype, lam::View& v) {
  if (!wanted) return allocate(operand, Shape{0});
  const auto sizes = operand.sizes();
  if (no_pairs) return torch::stable::new_zeros(operand, sizes);
  Tensor grad = allocate(operand, sizes);
  v = view(grad.mutable_data_ptr(), dtype, grad);
  return grad;
}

inline bool wanted(const std::vector<bool>& needs) {
  for (const bool one : needs)
    if (one) return true;
  return false;
}
inline void check_needs(const std::vector<bool>& needs, size_t count) {
  STD_TORCH_CHECK(needs.size() == count, "needs must hold ", count, " flags, has ", needs.size());
}

// The gradient of an operand that may be absent.
inline Tensor allocate_gradient(const OptionalTensor& operand, const Tensor& query, bool want, bool no_pairs,
                                lam::DType dtype, lam::View& v) {
  STD_TORCH_CHECK(operand || !want, "no gradient of an operand that is not there");
  return allocate_gradient(operand ? *operand : query, want, no_pairs, dtype, v);
}

// Gradients of query, key and value.
inline std::tuple<Tensor, Tensor, Tensor> allocate_row_gradients(lam::MaskedAttentionParams& p, const Tensor& query,
                                                                 const Tensor& key, const Tensor& value,
                                                                 const std::vector<bool>& needs, bool no_pairs) {
  const lam::DType dtype = p.query.dtype;
  std::tuple<Tensor, Tensor, Tensor> grads{allocate_gradient(query, needs[0], no_pairs, dtype, p.grad_query),
                                           allocate_gradient(key, needs[1], no_pairs, dtype, p.grad_key),
                                           allocate_gradient(value, needs[2], no_pairs, dtype, p.grad_value)};
  // A head dim of 1 is no broadcast: rows are addressed by their unit last stride.
  p.grad_query.stride[3] = p.grad_key.stride[3] = p.grad_value.stride[3] = 1;
  return grads;
}

// A result, its lse and its gradient, as the backward pass reads them; they outlive the kernel's call.
struct ResultGradient {
  Tensor grad_out, out, lse;
  lam::DType lse_dtype;

  ResultGradient(const Call& call, const Tensor& grad_out_in, const Tensor& out_in, const Tensor& lse_in)
      : grad_out(grad_out_in), out(out_in), lse(lse_in), lse_dtype(call.lse_kernel_dtype()) {
    const lam::MaskedAttentionParams& p = call.p;
    check_tensor(grad_out, "grad_out", {p.B, p.H, p.Lq, p.Dv});
    check_tensor(out, "out", {p.B, p.H, p.Lq, p.Dv});
    check_tensor(lse, "lse", {p.B, p.H, p.Lq});
    const ScalarType dtype = call.query.scalar_type();
    STD_TORCH_CHECK(grad_out.scalar_type() == dtype && out.scalar_type() == dtype,
                    "grad_out and out must have query's dtype");
    STD_TORCH_CHECK(lse.scalar_type() == call.lse_dtype(), "lse has the wrong dtype");
    grad_out = with_unit_last_stride(grad_out);
    out = as_contiguous(out);
    lse = as_contiguous(lse);
  }

  void fill(lam::MaskedAttentionParams& p) const {
    p.out = row_view(out, p.query.dtype);
    p.lse = view(input_data(lse), lse_dtype, lse);
    p.grad_out = row_view(grad_out, p.query.dtype);
  }
};

}  // namespace
