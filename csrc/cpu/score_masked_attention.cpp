// Compiled once for each level (level.h). bf16 and fp16 are computed in fp32, also at the levels with tiles.
#include "level.h"
//
#include "score_masked_attention.h"

namespace lam {

int LAM_AT_LEVEL(score_masked_attention_fwd)(const ScoreMaskedAttentionParams& p) {
#ifdef LAM_LEVEL_HAS_DOUBLE
  if (p.query.dtype == DType::f64) return ScoreMask<DoubleProducts::Word>::forward(p);
#endif
  return ScoreMask<LevelProducts::Word>::forward(p);
}

int LAM_AT_LEVEL(score_masked_attention_bwd)(const ScoreMaskedAttentionParams& p) {
#ifdef LAM_LEVEL_HAS_DOUBLE
  if (p.query.dtype == DType::f64) return ScoreMask<DoubleProducts::Word>::backward(p);
#endif
  return ScoreMask<LevelProducts::Word>::backward(p);
}

}  // namespace lam
