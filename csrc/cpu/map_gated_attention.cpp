// Compiled once for each level (level.h).
#include "level.h"
//
#include "map_gated_attention.h"

namespace lam {

int LAM_AT_LEVEL(map_gated_attention_fwd)(const MapGatedAttentionParams& p) {
#ifdef LAM_LEVEL_HAS_DOUBLE
  if (p.query.dtype == DType::f64) return MapGate<DoubleProducts>::forward(p);
#endif
  return MapGate<LevelProducts>::forward(p);
}

int LAM_AT_LEVEL(map_gated_attention_bwd)(const MapGatedAttentionParams& p) {
#ifdef LAM_LEVEL_HAS_DOUBLE
  if (p.query.dtype == DType::f64) return MapGate<DoubleProducts>::backward(p);
#endif
  return MapGate<LevelProducts>::backward(p);
}

}  // namespace lam
