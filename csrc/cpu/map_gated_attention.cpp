// Compiled once for each level (level.h).
#include "level.h"
//
#include "gates_fma.h"
#include "map_gated_attention.h"
#if defined(__AMX_BF16__) || defined(LAM_EMULATE_AMX)
#include "gates_amx.h"
#endif

namespace lam {
namespace {

#if defined(__AMX_BF16__) || defined(LAM_EMULATE_AMX)
using LevelGates = AmxGates;
#else
using LevelGates = FmaGates<LevelProducts::Word>;
#endif
using DoubleGates = FmaGates<DoubleProducts::Word>;

}  // namespace

int LAM_AT_LEVEL(map_gated_attention_fwd)(const MapGatedAttentionParams& p) {
#ifdef LAM_LEVEL_HAS_DOUBLE
  if (p.query.dtype == DType::f64) return MapGate<DoubleProducts, DoubleGates>::forward(p);
#endif
  return MapGate<LevelProducts, LevelGates>::forward(p);
}

int LAM_AT_LEVEL(map_gated_attention_bwd)(const MapGatedAttentionParams& p) {
#ifdef LAM_LEVEL_HAS_DOUBLE
  if (p.query.dtype == DType::f64) return MapGate<DoubleProducts, DoubleGates>::backward(p);
#endif
  return MapGate<LevelProducts, LevelGates>::backward(p);
}

}  // namespace lam
