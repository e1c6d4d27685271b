// Compiled once for each level (level.h).
#include "level.h"
//
#include "global_local_attention.h"

namespace lam {

int LAM_AT_LEVEL(global_local_attention_fwd)(const GlobalLocalAttentionParams& p) {
#ifdef LAM_LEVEL_HAS_DOUBLE
  if (p.query.dtype == DType::f64) return Forward<DoubleProducts, LocalMap>::run(p);
#endif
  return Forward<LevelProducts, LocalMap>::run(p);
}

int LAM_AT_LEVEL(global_local_attention_bwd)(const GlobalLocalAttentionParams& p) {
#ifdef LAM_LEVEL_HAS_DOUBLE
  if (p.query.dtype == DType::f64) return Backward<DoubleProducts, LocalMapBackward>::run(p);
#endif
  return Backward<LevelProducts, LocalMapBackward>::run(p);
}

}  // namespace lam
