// Every inline PTX instruction of the kernels, one wrapper each; a host compiler takes the emulation instead.
// tests/cuda/test_conformance.py compares each wrapper on a GPU with its emulation, bit for bit.
#pragma once
#if !defined(__CUDACC__)
#include "emulation/ptx_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DYNAMIC_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]
#define GRID_CONSTANT(Type, name) const __grid_constant__ Type name
#define LAUNCH_KERNEL(kernel, grid, size, shared_bytes, stream, ...) \
  kernel<<<(grid), (size), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void cp_async16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Kept>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Kept) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define LAM_MMA(T, name)                                                                                        \
  template <>                                                                                                   \
  __device__ __forceinline__ void mma_16816<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                         \
                 ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                                       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                           \
  }
LAM_MMA(__half, "f16")
LAM_MMA(__nv_bfloat16, "bf16")
#undef LAM_MMA

template <class T>
__device__ __forceinline__ T shared_load(const T* address) {
  return *address;
}
template <class T>
__device__ __forceinline__ void shared_store(T* address, T value) {
  *address = value;
}

}  // namespace ptx
#endif
