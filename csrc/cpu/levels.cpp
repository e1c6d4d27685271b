#include "levels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lam {

#define LAM_KERNELS(level)                                                     \
  int masked_attention_fwd_##level(const MaskedAttentionParams& p);             \
  int masked_attention_bwd_##level(const MaskedAttentionParams& p);             \
  int global_local_attention_fwd_##level(const GlobalLocalAttentionParams& p);  \
  int global_local_attention_bwd_##level(const GlobalLocalAttentionParams& p);  \
  int map_gated_attention_fwd_##level(const MapGatedAttentionParams& p);        \
  int map_gated_attention_bwd_##level(const MapGatedAttentionParams& p);        \
  int score_masked_attention_fwd_##level(const ScoreMaskedAttentionParams& p);  \
  int score_masked_attention_bwd_##level(const ScoreMaskedAttentionParams& p);
LAM_KERNELS(portable)
#ifdef __x86_64__
LAM_KERNELS(avx2)
LAM_KERNELS(avx512)
LAM_KERNELS(amx_emulated)
LAM_KERNELS(amx)
#endif
#undef LAM_KERNELS

namespace {

constexpr unsigned bit(DType dtype) { return 1u << static_cast<int>(dtype); }
constexpr unsigned kHalfAndSingle = bit(DType::f32) | bit(DType::bf16) | bit(DType::f16);

// Indexed by Level. A level that this build does not have serves nothing.
#define LAM_ROW(dtypes, level)                                                                          \
  {dtypes, masked_attention_fwd_##level, masked_attention_bwd_##level, global_local_attention_fwd_##level, \
   global_local_attention_bwd_##level, map_gated_attention_fwd_##level, map_gated_attention_bwd_##level,   \
   score_masked_attention_fwd_##level, score_masked_attention_bwd_##level}
constexpr LevelKernels kKernels[kLevels] = {
    LAM_ROW(kHalfAndSingle | bit(DType::f64), portable),
#ifdef __x86_64__
    LAM_ROW(kHalfAndSingle, avx2),
    LAM_ROW(kHalfAndSingle, avx512),
    LAM_ROW(bit(DType::bf16), amx_emulated),
    LAM_ROW(bit(DType::bf16), amx),
#endif
};
#undef LAM_ROW

constexpr const char* kNames[kLevels] = {"portable", "avx2", "avx512", "amx_emulated", "amx"};

struct Machine {
  bool available[kLevels] = {true, false, false, false, false};
};

#ifdef __x86_64__

// The register state that the system saves at a context switch; without it the instructions fault.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile state only to processes that ask; threads and forked children inherit it.
bool request_tile_state() {
#ifdef __linux__
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

Machine detect() {
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  Machine machine;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return machine;
  const bool fma = c & bit_FMA, f16c = c & bit_F16C, avx = c & bit_AVX, osxsave = c & bit_OSXSAVE;
  if (!osxsave || !avx || !fma || !f16c) return machine;
  const uint64_t saved = saved_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return machine;
  const uint32_t subleaves = a, features_b = b, features_d = d;
  auto at = [&](Level level) -> bool& { return machine.available[static_cast<int>(level)]; };

  at(Level::avx2) = (features_b & bit_AVX2) && (saved & kYmm) == kYmm;

  constexpr uint32_t k512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  at(Level::avx512) = at(Level::avx2) && (features_b & k512) == k512 && (saved & kZmm) == kZmm;
  at(Level::amx_emulated) = at(Level::avx512);

  constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  if (at(Level::avx512) && (features_d & kAmxBf16) && (features_d & kAmxTile) && (saved & kTiles) == kTiles &&
      subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16))
    at(Level::amx) = request_tile_state();
  return machine;
}

#else

Machine detect() { return {}; }

#endif

const Machine& machine() {
  static const Machine found = detect();
  return found;
}

struct Choice {
  Level level = Level::portable;
  char error[256] = "";
};

Choice choose() {
  Choice choice;
  for (int i = 0; i < kLevels; ++i)
    if (machine().available[i] && static_cast<Level>(i) != Level::amx_emulated) choice.level = static_cast<Level>(i);
  const char* asked = std::getenv("LAM_CPU_LEVEL");
  if (asked == nullptr || *asked == '\0') return choice;
  char runnable[96] = "";
  for (int i = 0; i < kLevels; ++i) {
    if (!machine().available[i]) continue;
    if (*runnable != '\0') std::strcat(runnable, ", ");
    std::strcat(runnable, kNames[i]);
  }
  for (int i = 0; i < kLevels; ++i) {
    if (std::strcmp(asked, kNames[i]) != 0) continue;
    choice.level = static_cast<Level>(i);
    if (!machine().available[i])
      std::snprintf(choice.error, sizeof choice.error, "LAM_CPU_LEVEL=%s: this machine can run only %s", asked,
                    runnable);
    return choice;
  }
  std::snprintf(choice.error, sizeof choice.error,
                "LAM_CPU_LEVEL=%.40s is no instruction-set level; this machine can run %s", asked, runnable);
  return choice;
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const char* level_name(Level level) { return kNames[static_cast<int>(level)]; }
bool level_available(Level level) { return machine().available[static_cast<int>(level)]; }
Level active_level() { return choice().level; }
const char* level_error() { return choice().error; }

const LevelKernels& kernels(DType dtype, Level level) {
  for (int i = static_cast<int>(level); i > 0; --i)
    if ((kKernels[i].dtypes & bit(dtype)) && machine().available[i]) return kKernels[i];
  return kKernels[0];
}

}  // namespace lam
