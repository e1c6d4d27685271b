// Small kernels for the tests of the emulator itself: healthy ones, and each kind of fault that it must find.
//
//   emulator NAME [SEED]     prints "right", "wrong: ..." (exit 1) or "fault: ..." (exit 3)
#define EMULATION_IMPLEMENTATION
#include <map>

#include "cuda/ptx.cuh"

namespace {

using bf16 = __nv_bfloat16;
constexpr dim3 kOne(1, 1, 1), kTwo(2, 1, 1), kWarp(32, 1, 1), kTwoWarps(64, 1, 1);

std::vector<float> floats(size_t n, float value = 0) { return std::vector<float>(n, value); }
std::vector<float> counting(size_t n) {
  std::vector<float> x(n);
  for (size_t k = 0; k < n; ++k) x[k] = static_cast<float>(k);
  return x;
}
std::string compare(const std::vector<float>& got, const std::vector<float>& want) {
  for (size_t k = 0; k < want.size(); ++k)
    if (!(got[k] == want[k]))
      return "wrong: element " + std::to_string(k) + " is " + std::to_string(got[k]) + ", expected " +
             std::to_string(want[k]);
  return "right";
}

// ---- exchange through shared memory: each thread reads its neighbour's element
__global__ void exchange(const float* x, float* y, bool barrier) {
  __shared__ float s[64];
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  if (barrier) __syncthreads();
  y[t] = s[(t + 33) % 64];
}
std::string run_exchange(bool barrier) {
  const auto x = counting(64);
  auto y = floats(64), want = floats(64);
  for (size_t t = 0; t < 64; ++t) want[t] = x[(t + 33) % 64];
  LAUNCH_KERNEL(exchange, kOne, kTwoWarps, 0, nullptr, x.data(), y.data(), barrier);
  return compare(y, want);
}

// ---- the same within a warp, ordered by __syncwarp
__global__ void exchange_in_warp(float* y, bool ordered) {
  DYNAMIC_SHARED_MEMORY(memory);
  float* s = reinterpret_cast<float*>(memory);
  const unsigned t = threadIdx.x;
  s[t] = static_cast<float>(t);
  if (ordered) __syncwarp();
  y[t] = s[t ^ 1];
}
std::string run_exchange_in_warp(bool ordered) {
  auto y = floats(32), want = floats(32);
  for (size_t t = 0; t < 32; ++t) want[t] = static_cast<float>(t ^ 1);
  LAUNCH_KERNEL(exchange_in_warp, kOne, kWarp, 128, nullptr, y.data(), ordered);
  return compare(y, want);
}

// ---- a ring of cp.async buffers: sum of 8 tiles of 64 x 4 floats
enum class Ring { healthy, no_barrier_after_wait, no_barrier_before_reuse, waits_for_too_little };
__global__ void ring(const float* x, float* y, Ring kind) {
  DYNAMIC_SHARED_MEMORY(memory);
  float* s = reinterpret_cast<float*>(memory);
  const unsigned t = threadIdx.x;
  auto issue = [&](int tile) {
    if (tile < 8) ptx::cp_async16(s + (tile & 1) * 256 + t * 4, x + tile * 256 + t * 4, 16);
    ptx::cp_async_commit();
  };
  issue(0);
  float sum = 0;
  for (int tile = 0; tile < 8; ++tile) {
    issue(tile + 1);
    if (kind == Ring::waits_for_too_little) ptx::cp_async_wait<2>();
    else ptx::cp_async_wait<1>();
    if (kind != Ring::no_barrier_after_wait) __syncthreads();
    for (int k = 0; k < 4; ++k) sum += s[(tile & 1) * 256 + ((t + 21) % 64) * 4 + k];
    if (kind != Ring::no_barrier_before_reuse) __syncthreads();
  }
  ptx::cp_async_wait<0>();
  y[t] = sum;
}
std::string run_ring(Ring kind) {
  const auto x = counting(8 * 256);
  auto y = floats(64), want = floats(64);
  for (size_t t = 0; t < 64; ++t)
    for (size_t tile = 0; tile < 8; ++tile)
      for (size_t k = 0; k < 4; ++k) want[t] += x[tile * 256 + (t + 21) % 64 * 4 + k];
  LAUNCH_KERNEL(ring, kOne, kTwoWarps, 2048, nullptr, x.data(), y.data(), kind);
  return compare(y, want);
}

// ---- a copy of fewer than 16 bytes fills the rest with zeros
__global__ void partial_copy(const float* x, float* y, int bytes, int misaligned_by) {
  DYNAMIC_SHARED_MEMORY(memory);
  float* s = reinterpret_cast<float*>(memory);
  ptx::cp_async16(s + 4 * threadIdx.x, x + 4 * threadIdx.x + misaligned_by, bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int k = 0; k < 4; ++k) y[4 * threadIdx.x + k] = s[4 * threadIdx.x + k];
}
std::string run_partial_copy(int misaligned_by) {
  const auto x = counting(136);
  auto y = floats(128), want = floats(128);
  for (size_t k = 0; k < 128; ++k) want[k] = k % 4 < 2 ? x[k] : 0;
  LAUNCH_KERNEL(partial_copy, kOne, kWarp, 512, nullptr, x.data(), y.data(), 8, misaligned_by);
  return compare(y, want);
}

// ---- tensor-core product: rows of A and B through ldmatrix, 16 x 8 x 16, exact in integers
template <class T>
__global__ void product(const T* a, const T* b, float* c, unsigned pitch) {
  DYNAMIC_SHARED_MEMORY(memory);
  T* s = reinterpret_cast<T*>(memory);
  const unsigned lane = threadIdx.x;
  for (unsigned k = lane; k < 256; k += 32) s[k / 16 * pitch + k % 16] = a[k];
  T* sb = s + 16 * pitch;  // [k][n], 16 columns, read transposed
  for (unsigned k = lane; k < 256; k += 32) sb[k / 16 * pitch + k % 16] = b[k];
  __syncwarp();
  uint32_t fa[4], fb[4];
  ptx::ldmatrix_x4(fa, s + (lane % 16) * pitch + lane / 16 * 8);
  ptx::ldmatrix_x4_trans(fb, sb + (lane % 16) * pitch + lane / 16 * 8);
  for (int n = 0; n < 2; ++n) {
    float d[4] = {};
    const uint32_t column[2] = {fb[2 * n], fb[2 * n + 1]};
    ptx::mma_16816<T>(d, fa, column);
    for (unsigned e = 0; e < 4; ++e)
      c[(lane / 4 + e / 2 * 8) * 16 + static_cast<unsigned>(n) * 8 + 2 * (lane % 4) + (e & 1)] = d[e];
  }
}
template <class T>
std::string run_product() {
  std::vector<T> a(256), b(256);
  auto c = floats(256), want = floats(256);
  for (int k = 0; k < 256; ++k)
    a[static_cast<size_t>(k)] = T(static_cast<float>(k * 7 % 17 - 8)), b[static_cast<size_t>(k)] = T(static_cast<float>(k * 5 % 13 - 6));
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 16; ++j)
      for (size_t k = 0; k < 16; ++k)
        want[i * 16 + j] += static_cast<float>(a[i * 16 + k]) * static_cast<float>(b[k * 16 + j]);
  LAUNCH_KERNEL(product<T>, kOne, kWarp, 32 * 24 * 2, nullptr, a.data(), b.data(), c.data(), 24u);
  return compare(c, want);
}

// ---- bank conflicts: rows of an 8x8 matrix at several pitches; four-byte loads at several strides
__global__ void read_rows(unsigned pitch_bytes) {
  DYNAMIC_SHARED_MEMORY(memory);
  uint32_t out[4];
  ptx::ldmatrix_x4(out, memory + threadIdx.x % 16 * pitch_bytes + threadIdx.x / 16 * 16);
}
__global__ void read_strided(unsigned stride, float* y) {
  DYNAMIC_SHARED_MEMORY(memory);
  y[threadIdx.x] = ptx::shared_load(reinterpret_cast<const float*>(memory) + threadIdx.x * stride);
}
std::string run_bank_conflicts() {
  emulation::options.count_banks = true;
  std::string text;
  for (const unsigned pitch : {128u, 144u, 64u, 80u, 256u, 272u}) {
    emulation::counters = {};
    LAUNCH_KERNEL(read_rows, kOne, kWarp, 8192, nullptr, pitch);
    text += std::to_string(pitch) + ":" + std::to_string(emulation::counters.ldmatrix_conflicts) + " ";
  }
  auto y = floats(32);
  for (const unsigned stride : {1u, 2u, 8u, 33u}) {
    emulation::counters = {};
    LAUNCH_KERNEL(read_strided, kOne, kWarp, 8192, nullptr, stride, y.data());
    text += std::to_string(stride) + ":" + std::to_string(emulation::counters.shared_conflicts) + " ";
  }
  return text == "128:28 144:0 64:12 80:0 256:28 272:0 1:0 2:1 8:7 33:0 " ? "right" : "wrong: " + text;
}

// ---- warp operations
__global__ void warp_operations(float* y) {
  const float lane = static_cast<float>(threadIdx.x);
  const int l = static_cast<int>(threadIdx.x);
  float sum = lane;
  for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  const float checks[] = {sum - 496, __shfl_sync(~0u, lane, 5) - 5, __shfl_sync(~0u, lane, 1, 8) - static_cast<float>(l / 8 * 8 + 1),
                          __shfl_down_sync(~0u, lane, 2) - static_cast<float>(l < 30 ? l + 2 : l),
                          __shfl_up_sync(~0u, lane, 3) - static_cast<float>(l >= 3 ? l - 3 : l),
                          __ballot_sync(~0u, l % 3 == 0) == 0x49249249u ? 0.f : 1.f,
                          __any_sync(~0u, l == 7) && !__all_sync(~0u, l == 7) ? 0.f : 1.f};
  y[threadIdx.x] = 0;
  for (const float check : checks) y[threadIdx.x] += check < 0 ? -check : check;
}
std::string run_warp_operations() {
  auto y = floats(32, 1);
  LAUNCH_KERNEL(warp_operations, kOne, kWarp, 0, nullptr, y.data());
  return compare(y, floats(32));
}

// ---- atomics are no race; a plain sum by two blocks is one
__global__ void count_blocks(float* y, bool atomic) {
  if (threadIdx.x != 0) return;
  if (atomic) atomicAdd(y, 1.f);
  else y[0] += 1;
}
std::string run_count_blocks(bool atomic) {
  emulation::options.new_threads_per_block = true;
  auto y = floats(1);
  LAUNCH_KERNEL(count_blocks, kTwo, kTwoWarps, 0, nullptr, y.data(), atomic);
  return compare(y, floats(1, 2));
}

// ---- one fault each
__global__ void read_past_the_end(const float* mask, float* y) { y[threadIdx.x] = mask[threadIdx.x + 1]; }
std::string run_read_past_the_end() {
  const auto mask = counting(64);
  auto y = floats(64), want = floats(64);
  for (size_t k = 0; k < 63; ++k) want[k] = mask[k + 1];
  LAUNCH_KERNEL(read_past_the_end, kOne, kTwoWarps, 0, nullptr, mask.data(), y.data());
  y[63] = 0;
  return compare(y, want);
}
__global__ void uninitialised(float* y) {
  __shared__ float s[64];
  if (threadIdx.x < 32) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
std::string run_uninitialised() {
  auto y = floats(64);
  LAUNCH_KERNEL(uninitialised, kOne, kTwoWarps, 0, nullptr, y.data());
  return compare(y, floats(64, 1));
}
__global__ void shared_past_the_end(float* y) {
  DYNAMIC_SHARED_MEMORY(memory);
  reinterpret_cast<float*>(memory)[threadIdx.x] = 1;
  y[threadIdx.x] = 1;
}
std::string run_shared_past_the_end() {
  auto y = floats(64);
  LAUNCH_KERNEL(shared_past_the_end, kOne, kTwoWarps, 63 * 4, nullptr, y.data());
  return compare(y, floats(64, 1));
}
__global__ void misaligned(float* y) { *reinterpret_cast<uint4*>(y + 1) = uint4{0, 0, 0, 0}; }
std::string run_misaligned() {
  auto y = floats(64);
  LAUNCH_KERNEL(misaligned, kOne, kOne, 0, nullptr, y.data());
  return compare(y, floats(64));
}
__global__ void divergent_barrier() {
  if (threadIdx.x < 16) __syncthreads();
}
std::string run_divergent_barrier() {
  LAUNCH_KERNEL(divergent_barrier, kOne, kTwoWarps, 0, nullptr);
  return "right";
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
}
std::string run_two_barriers() {
  LAUNCH_KERNEL(two_barriers, kOne, kTwoWarps, 0, nullptr);
  return "right";
}
__global__ void divergent_warp(float* y) {
  y[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(~0u, 1.f, 1) : static_cast<float>(__ballot_sync(~0u, 1));
}
std::string run_divergent_warp() {
  auto y = floats(32);
  LAUNCH_KERNEL(divergent_warp, kOne, kWarp, 0, nullptr, y.data());
  return "right";
}
__global__ void lane_missing() {
  if (threadIdx.x != 3) __syncwarp();
}
std::string run_lane_missing() {
  LAUNCH_KERNEL(lane_missing, kOne, kWarp, 0, nullptr);
  return "right";
}
__global__ void copy_in_flight(const float* x) {
  DYNAMIC_SHARED_MEMORY(memory);
  ptx::cp_async16(memory + 16 * threadIdx.x, x + 4 * threadIdx.x, 16);
}
std::string run_copy_in_flight() {
  const auto x = counting(128);
  LAUNCH_KERNEL(copy_in_flight, kOne, kWarp, 512, nullptr, x.data());
  return "right";
}
__global__ void misaligned_row() {
  DYNAMIC_SHARED_MEMORY(memory);
  uint32_t out[4];
  ptx::ldmatrix_x4(out, memory + 8 * threadIdx.x);
}
std::string run_misaligned_row() {
  LAUNCH_KERNEL(misaligned_row, kOne, kWarp, 512, nullptr);
  return "right";
}
std::string run_too_much_shared_memory() {
  LAUNCH_KERNEL(divergent_barrier, kOne, kWarp, 232449, nullptr);
  return "right";
}
// After a fault the emulator goes on working.
std::string run_after_a_fault() {
  try {
    run_divergent_barrier();
    return "wrong: no fault";
  } catch (const emulation::Fault&) {
    return run_exchange(true);
  }
}

const std::map<std::string, std::function<std::string()>> kTests = {
    {"exchange", [] { return run_exchange(true); }},
    {"missing_barrier", [] { return run_exchange(false); }},
    {"exchange_in_warp", [] { return run_exchange_in_warp(true); }},
    {"missing_syncwarp", [] { return run_exchange_in_warp(false); }},
    {"ring", [] { return run_ring(Ring::healthy); }},
    {"no_barrier_after_wait", [] { return run_ring(Ring::no_barrier_after_wait); }},
    {"no_barrier_before_reuse", [] { return run_ring(Ring::no_barrier_before_reuse); }},
    {"waits_for_too_little", [] { return run_ring(Ring::waits_for_too_little); }},
    {"partial_copy", [] { return run_partial_copy(0); }},
    {"misaligned_copy", [] { return run_partial_copy(1); }},
    {"product_bf16", [] { return run_product<bf16>(); }},
    {"product_f16", [] { return run_product<__half>(); }},
    {"bank_conflicts", [] { return run_bank_conflicts(); }},
    {"warp_operations", [] { return run_warp_operations(); }},
    {"atomic_sum", [] { return run_count_blocks(true); }},
    {"race_between_blocks", [] { return run_count_blocks(false); }},
    {"read_past_the_end", run_read_past_the_end},
    {"uninitialised", run_uninitialised},
    {"shared_past_the_end", run_shared_past_the_end},
    {"misaligned", run_misaligned},
    {"divergent_barrier", run_divergent_barrier},
    {"two_barriers", run_two_barriers},
    {"divergent_warp", run_divergent_warp},
    {"lane_missing", run_lane_missing},
    {"copy_in_flight", run_copy_in_flight},
    {"misaligned_row", run_misaligned_row},
    {"too_much_shared_memory", run_too_much_shared_memory},
    {"after_a_fault", run_after_a_fault},
};

}  // namespace

int main(int argc, char** argv) {
  const auto found = kTests.find(argc > 1 ? argv[1] : "");
  if (found == kTests.end()) return std::fputs("usage: emulator NAME [SEED]\n", stderr), 2;
  emulation::options.seed = argc > 2 ? static_cast<uint64_t>(std::atol(argv[2])) : 1;
  try {
    const std::string verdict = found->second();
    std::puts(verdict.c_str());
    return verdict == "right" ? 0 : 1;
  } catch (const emulation::Fault& fault) {
    std::printf("fault: %s\n", fault.what());
    return 3;
  }
}
