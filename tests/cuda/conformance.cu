// One test kernel a PTX wrapper. The same file runs on a GPU (nvcc) and emulated (a host compiler) and prints the
// same lines where the emulation does what the instruction does: name, then every output word in hex.
#if !defined(__CUDACC__)
#define EMULATION_IMPLEMENTATION
#endif
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/ptx.cuh"

namespace {

constexpr int kWords = 32 * 16;

__global__ void copy_kernel(const uint32_t* in, uint32_t* out) {
  DYNAMIC_SHARED_MEMORY(memory);
  uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
  const unsigned lane = threadIdx.x;
  for (unsigned k = 0; k < 16; ++k) shared[lane * 16 + k] = 0xABABABABu;
  __syncwarp();
  // four groups with every number of bytes from 0 to 16; one is waited for before the rest is issued
  ptx::cp_async16(shared + lane * 16, in + lane * 4, static_cast<int>(lane % 17));
  ptx::cp_async_commit();
  ptx::cp_async16(shared + lane * 16 + 4, in + 128 + lane * 4, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  out[lane * 16] = shared[lane * 16], out[lane * 16 + 1] = shared[lane * 16 + 1];
  out[lane * 16 + 2] = shared[lane * 16 + 2], out[lane * 16 + 3] = shared[lane * 16 + 3];
  ptx::cp_async_wait<0>();
  for (unsigned k = 4; k < 16; ++k) out[lane * 16 + k] = shared[lane * 16 + k];
}

template <bool Transposed>
__global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
  DYNAMIC_SHARED_MEMORY(memory);
  uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
  const unsigned lane = threadIdx.x;
  for (unsigned k = 0; k < 16; ++k) shared[lane * 16 + k] = in[lane * 16 + k];
  __syncwarp();
  uint32_t matrices[4];
  const uint32_t* row = shared + (lane * 5 % 32) * 16 + lane % 4 * 4;
  if (Transposed) ptx::ldmatrix_x4_trans(matrices, row);
  else ptx::ldmatrix_x4(matrices, row);
  for (unsigned k = 0; k < 4; ++k) out[lane * 16 + k] = matrices[k];
}

// Every sum is exact: products of small integers.
template <class T>
__global__ void mma_kernel(const uint32_t* in, uint32_t* out) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  auto element = [&](unsigned k) { return T(static_cast<float>(static_cast<int>(in[lane * 16 + k] % 33) - 16)); };
  for (unsigned k = 0; k < 4; ++k) {
    const T pair[2] = {element(2 * k), element(2 * k + 1)};
    memcpy(&a[k], pair, 4);
    d[k] = static_cast<float>(static_cast<int>(in[lane * 16 + 12 + k] % 1001) - 500);
  }
  for (unsigned k = 0; k < 2; ++k) {
    const T pair[2] = {element(8 + 2 * k), element(9 + 2 * k)};
    memcpy(&b[k], pair, 4);
  }
  ptx::mma_16816<T>(d, a, b);
  for (unsigned k = 0; k < 4; ++k) memcpy(&out[lane * 16 + k], &d[k], 4);
}

uint32_t* allocate() {
  void* memory = nullptr;
#if defined(__CUDACC__)
  if (cudaMallocManaged(&memory, kWords * 4) != cudaSuccess) std::exit(4);
#else
  memory = aligned_alloc(256, kWords * 4);
#endif
  std::memset(memory, 0, kWords * 4);
  return static_cast<uint32_t*>(memory);
}

template <class Kernel>
void run(const char* name, Kernel* kernel, uint32_t seed) {
  uint32_t *in = allocate(), *out = allocate();
  for (int k = 0; k < kWords; ++k) seed = seed * 1664525u + 1013904223u, in[k] = seed >> 3;
  LAUNCH_KERNEL(kernel, dim3(1, 1, 1), dim3(32, 1, 1), kWords * 4, nullptr, in, out);
#if defined(__CUDACC__)
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error)), std::exit(4);
#endif
  std::printf("%s", name);
  for (int k = 0; k < kWords; ++k) std::printf(" %08x", out[k]);
  std::printf("\n");
}

}  // namespace

int main() {
  for (uint32_t seed = 1; seed <= 4; ++seed) {
    run("cp_async16", copy_kernel, seed);
    run("ldmatrix_x4", ldmatrix_kernel<false>, seed);
    run("ldmatrix_x4_trans", ldmatrix_kernel<true>, seed);
    run("mma_16816_f16", mma_kernel<__half>, seed);
    run("mma_16816_bf16", mma_kernel<__nv_bfloat16>, seed);
  }
  return 0;
}
