// Level "avx512": fp32, bf16 and fp16, computed in fp32.
#include "vec_avx512.h"
//
#include "masked_attention_backward.h"

namespace lam {

int masked_attention_fwd_avx512(const MaskedAttentionParams& p) { return Forward<FmaProducts<VecAvx512>>::run(p); }
int masked_attention_bwd_avx512(const MaskedAttentionParams& p) { return Backward<FmaProducts<VecAvx512>>::run(p); }

}  // namespace lam
