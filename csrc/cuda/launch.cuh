// One way to launch a kernel for nvcc and for the emulation; an error comes back as a sentence.
#pragma once
#include "cuda/masked_attention.h"
#include "cuda/ptx.cuh"
#if !defined(__CUDACC__)
#include <string>
#endif

namespace lam {
namespace cuda {
namespace {

template <class Kernel, class Call>
const char* launch(Kernel* kernel, int blocks, int threads, int shared_bytes, const Call& call, void* stream) {
  if (blocks == 0) return nullptr;
#if defined(__CUDACC__)
  if (shared_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  LAUNCH_KERNEL(kernel, dim3(blocks), dim3(threads), shared_bytes, stream, call);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  static thread_local std::string message;
  try {
    LAUNCH_KERNEL(kernel, dim3(static_cast<unsigned>(blocks), 1, 1), dim3(static_cast<unsigned>(threads), 1, 1),
                  static_cast<size_t>(shared_bytes), stream, call);
    return nullptr;
  } catch (const emulation::Fault& fault) {
    message = fault.what();
    return message.c_str();
  }
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace lam
