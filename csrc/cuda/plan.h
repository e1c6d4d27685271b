// The kernels' half types by names that a file without CUDA headers can use.
#pragma once
struct __nv_bfloat16;
struct __half;
namespace lam {
namespace cuda {
using Bf16 = ::__nv_bfloat16;
using Half = ::__half;
}  // namespace cuda
}  // namespace lam
