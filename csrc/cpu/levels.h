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

// Every kernel that a level may have.
struct LevelKernels {
  unsigned dtypes;  // bits, by DType
  MaskedAttentionKernel masked_attention_fwd, masked_attention_bwd;
  GlobalLocalAttentionKernel global_local_attention_fwd, global_local_attention_bwd;
  MapGatedAttentionKernel map_gated_attention_fwd, map_gated_attention_bwd;
  ScoreMaskedAttentionKernel score_masked_attention_fwd, score_masked_attention_bwd;
};

// The kernels of `level` (default: the active one) for tensors of this type; a level without them uses the next below.
const LevelKernels& kernels(DType dtype, Level level);
inline const LevelKernels& kernels(DType dtype) { return kernels(dtype, active_level()); }

}  // namespace lam
