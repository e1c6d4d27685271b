// Scratch memory that survives a call: page faults of fresh memory would cost more than some kernels do.
#pragma once
#include <cstdint>

namespace lam {

// 64-byte aligned, contents undefined; nullptr when the system has none. Safe from any thread, and after a fork.
void* scratch_acquire(int64_t bytes);
void scratch_release(void* block);

// Returns what is cached and unused to the system; the number of bytes that were.
int64_t scratch_trim();

}  // namespace lam
