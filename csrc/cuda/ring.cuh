// Chunks on their way into shared memory while earlier ones are worked on.
#pragma once
#include "cuda/tiles.cuh"

namespace lam {
namespace cuda {
namespace {

// Goes ahead of the block's own walk. With the first chunk of a pair come the rows that the block owns of it.
// A Walk has member, first_member, is_first(), done(), advance() and issue(ring), which copies what its chunk needs.
template <class T, class Walk>
struct Ring {
  const Layout& layout;
  unsigned char* memory;
  const Threads& threads;
  Walk ahead;
  int issued = 0;

  __device__ __forceinline__ Ring(const Layout& l, unsigned char* m, const Threads& t, const Walk& start)
      : layout(l), memory(m), threads(t), ahead(start) {}

  __device__ __forceinline__ T* rows(int offset, int pitch, int member) const {
    const int slot = (member - ahead.first_member) % layout.row_slots;
    return at<T>(memory, offset) + slot * 16 * layout.warps * pitch;
  }
  __device__ __forceinline__ T* chunk(int offset, int pitch, int step) const {
    return at<T>(memory, offset) + step % layout.stages * kChunk * pitch;
  }
  __device__ __forceinline__ void issue() {
    ahead.issue(*this);
    ptx::cp_async_commit();
    ++issued;
    ahead.advance();
  }
  // On return the data of `step` is there for all, and every warp is done with the step before.
  __device__ __forceinline__ void begin(int step, const Walk& now) {
    if (issued == step) {
      __syncthreads();
      issue();
    }
    wait_for_copies(issued - 1 - step);
    __syncthreads();
    while (!ahead.done() && issued < step + layout.stages && ahead.member < now.member + layout.row_slots) issue();
  }
};

}  // namespace
}  // namespace cuda
}  // namespace lam
