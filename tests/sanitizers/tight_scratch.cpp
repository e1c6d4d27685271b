// Stands in for csrc/cpu/scratch.cpp under the sanitizers: blocks of exactly the size that was asked for, never reused,
// full of NaN.
#include <cstdlib>
#include <cstring>

#include "cpu/scratch.h"

namespace lam {

void* scratch_acquire(int64_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, 64, static_cast<size_t>(bytes)) != 0) return nullptr;
  std::memset(block, 0xff, static_cast<size_t>(bytes));
  return block;
}

void scratch_release(void* block) { std::free(block); }

int64_t scratch_trim() { return 0; }

}  // namespace lam
