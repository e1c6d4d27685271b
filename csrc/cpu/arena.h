// One worker's scratch memory, cut into arrays.
#pragma once
#include <cstdint>

#include "rows.h"
#include "scratch.h"

namespace lam {
namespace {

// Runs twice: with base == nullptr it only counts.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

struct ScratchBlock {
  void* data;
  explicit ScratchBlock(int64_t bytes) : data(scratch_acquire(bytes)) {}
  ~ScratchBlock() { scratch_release(data); }
  ScratchBlock(const ScratchBlock&) = delete;
  ScratchBlock& operator=(const ScratchBlock&) = delete;
};

}  // namespace
}  // namespace lam
