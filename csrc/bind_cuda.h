// How bindings run the CUDA kernels: on the current stream of the tensors' device, or emulated at once.
#pragma once
#include "bind_call.h"
#include "cuda/masked_attention.h"

#if defined(LAM_ON_GPU)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
// Weak: the library also loads in a torch without CUDA, where nobody calls it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));
#endif

namespace {

#if defined(LAM_ON_GPU)
// The device of the call, and its current stream.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit Place(const Tensor& t) : guard(t.get_device()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
  }
};
#else
struct Place {
  void* stream = nullptr;
  explicit Place(const Tensor&) {}
};
#endif

inline void check_limits(const lam::MaskedAttentionParams& p) {
  const char* limit = lam::cuda::masked_attention_limits(p);
  STD_TORCH_CHECK(*limit == '\0', "the CUDA kernels cannot take this call: the backend ", limit);
}
inline void check_launched(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "masked_attention on CUDA: ", error ? error : "");
}
inline void run_forward(const lam::MaskedAttentionParams& p, const Tensor& like) {
  const Place place(like);
  check_launched(lam::cuda::masked_attention_forward(p, lam::cuda::current_device(), place.stream));
}
inline void run_backward(const lam::MaskedAttentionParams& p, const Tensor& like) {
  const Place place(like);
  const lam::cuda::Device device = lam::cuda::current_device();
  const Shape size{lam::cuda::masked_attention_backward_bytes(p, device) / 4};
  Tensor scratch = allocate(like, size, ScalarType::Float);
  check_launched(lam::cuda::masked_attention_backward(p, device, scratch.mutable_data_ptr(), place.stream));
}

}  // namespace
