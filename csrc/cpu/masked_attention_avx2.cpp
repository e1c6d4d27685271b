// Level "avx2": fp32, bf16 and fp16, computed in fp32.
#include "vec_avx2.h"
//
#include "masked_attention_backward.h"

namespace lam {

int masked_attention_fwd_avx2(const MaskedAttentionParams& p) { return Forward<FmaProducts<VecAvx2>>::run(p); }
int masked_attention_bwd_avx2(const MaskedAttentionParams& p) { return Backward<FmaProducts<VecAvx2>>::run(p); }

}  // namespace lam
