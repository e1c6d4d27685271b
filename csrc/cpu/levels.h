// Which instruction-set level runs: what this CPU and this system allow, and what LAM_CPU_LEVEL asks for.
#pragma once
#include "../lam.h"

#define LAM_EXPORT __attribute__((visibility("default")))

namespace lam {

// From the least to the most demanding. amx_emulated is the AMX kernel source with the tile instructions spelt out in
// AVX-512; it is never chosen by itself.
enum class Level : int32_t { portable = 0, avx2 = 1, avx512 = 2, amx_emulated = 3, amx = 4 };
constexpr int kLevels = 5;

LAM_EXPORT const char* level_name(Level level);

// True when this build has the level and this machine can run it.
LAM_EXPORT bool level_available(Level level);

// The level in use, fixed at the first call. Valid only if level_error() is "".
LAM_EXPORT Level active_level();

// Why LAM_CPU_LEVEL cannot be followed, or "". Then there is no kernel at all: a forced level is never replaced.
LAM_EXPORT const char* level_error();

// The kernel of `level` (default: the active one) for tensors of this type; a level without one uses the next below.
MaskedAttentionKernel masked_attention_fwd_kernel(DType dtype, Level level);
MaskedAttentionKernel masked_attention_bwd_kernel(DType dtype, Level level);
inline MaskedAttentionKernel masked_attention_fwd_kernel(DType dtype) {
  return masked_attention_fwd_kernel(dtype, active_level());
}
inline MaskedAttentionKernel masked_attention_bwd_kernel(DType dtype) {
  return masked_attention_bwd_kernel(dtype, active_level());
}

}  // namespace lam
