// What CUDA C++ offers a kernel without PTX: built-in variables, barriers, shuffles, votes, atomics.
#pragma once

#define threadIdx (emulation::block.current->index)
#define blockIdx (emulation::block.block_index)
#define blockDim (emulation::block.block_size)
#define gridDim (emulation::block.grid_size)

// For nvcc: csrc/cuda/ptx.cuh.
#define DYNAMIC_SHARED_MEMORY(name) \
  unsigned char* name = reinterpret_cast<unsigned char*>(emulation::block.shared)
#define GRID_CONSTANT(Type, name) const Type& name
#define LAUNCH_KERNEL(kernel, grid, size, shared_bytes, stream, ...)                                        \
  do {                                                                                                      \
    const dim3 grid_ = (grid), size_ = (size);                                                              \
    (void)(stream);                                                                                         \
    emulation::launch({grid_.x, grid_.y, grid_.z}, {size_.x, size_.y, size_.z}, (shared_bytes),             \
                      [&] { kernel(__VA_ARGS__); });                                                        \
  } while (0)

// Every __syncthreads() of the source is a barrier site of its own.
#define __syncthreads()                         \
  emulation::barrier_wait(0, 0, ([]() -> const void* { \
                            static char site;   \
                            return &site;       \
                          })())
inline void __syncwarp(uint32_t mask = ~0u) { emulation::collective("__syncwarp", mask, true); }

namespace emulation {

template <class T>
EMULATION_UNSEEN inline T shuffle(const char* operation, uint32_t mask, T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint32_t words[2] = {0, 0};
  std::memcpy(words, &value, sizeof(T));
  Warp::Slot& mine = deposit();
  mine.word[lane_id()][0] = words[0], mine.word[lane_id()][1] = words[1];
  const Warp::Slot& all = collective(operation, mask);
  source &= 31;
  if (!(mask >> source & 1)) fail("%s reads lane %u, which the mask leaves out", operation, source);
  words[0] = all.word[source][0], words[1] = all.word[source][1];
  std::memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace emulation

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const unsigned lane = emulation::lane_id(), w = static_cast<unsigned>(width);
  return emulation::shuffle("__shfl_sync", mask, value, (lane & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1)));
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int other, int width = 32) {
  const unsigned lane = emulation::lane_id(), w = static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(other);
  return emulation::shuffle("__shfl_xor_sync", mask, value, source < (lane | (w - 1)) + 1 ? source : lane);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32) {
  const unsigned lane = emulation::lane_id(), w = static_cast<unsigned>(width);
  return emulation::shuffle("__shfl_down_sync", mask, value, (lane & (w - 1)) + by < w ? lane + by : lane);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32) {
  const unsigned lane = emulation::lane_id(), w = static_cast<unsigned>(width);
  return emulation::shuffle("__shfl_up_sync", mask, value, (lane & (w - 1)) >= by ? lane - by : lane);
}
EMULATION_UNSEEN inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  emulation::deposit().word[emulation::lane_id()][0] = predicate != 0;
  const emulation::Warp::Slot& all = emulation::collective("__ballot_sync", mask);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) result |= all.word[lane][0] << lane;
  return result;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Relaxed, and known to ThreadSanitizer as atomic.
inline float atomicAdd(float* address, float value) {
  auto* word = reinterpret_cast<uint32_t*>(address);
  uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED), sum;
  float before;
  do {
    std::memcpy(&before, &old, 4);
    const float after = before + value;
    std::memcpy(&sum, &after, 4);
  } while (!__atomic_compare_exchange_n(word, &old, sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
