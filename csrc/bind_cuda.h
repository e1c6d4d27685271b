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

// One op's entry points of csrc/cuda.
template <class Params>
struct CudaKernels {
  const char* op;
  const char* (*forward)(const Params&, const lam::cuda::Device&, void* stream);
  const char* (*backward)(const Params&, const lam::cuda::Device&, void* scratch, void* stream);
  int64_t (*backward_bytes)(const Params&, const lam::cuda::Device&);

  void check_limits(const lam::MaskedAttentionParams& p) const {
    const char* limit = lam::cuda::masked_attention_limits(p);
    STD_TORCH_CHECK(*limit == '\0', "the CUDA kernels cannot take this call: the backend ", limit);
  }
  void check_launched(const char* error) const {
    STD_TORCH_CHECK(error == nullptr, op, " on CUDA: ", error ? error : "");
  }
  void run_forward(const Params& p, const Tensor& like) const {
    const Place place(like);
    check_launched(forward(p, lam::cuda::current_device(), place.stream));
  }
  void run_backward(const Params& p, const Tensor& like) const {
    const Place place(like);
    const lam::cuda::Device device = lam::cuda::current_device();
    const Shape size{backward_bytes(p, device) / 4};
    Tensor scratch = allocate(like, size, ScalarType::Float);
    check_launched(backward(p, device, scratch.mutable_data_ptr(), place.stream));
  }
};

}  // namespace
