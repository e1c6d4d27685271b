// Level "amx": bf16 on AMX tiles. Compiled a second time with LAM_EMULATE_AMX as level "amx_emulated", for tests.
#include "vec_avx512.h"
//
#include "masked_attention_backward.h"
#include "products_amx.h"

namespace lam {

#ifdef LAM_EMULATE_AMX
int masked_attention_fwd_amx_emulated(const MaskedAttentionParams& p) { return Forward<AmxProducts>::run(p); }
int masked_attention_bwd_amx_emulated(const MaskedAttentionParams& p) { return Backward<AmxProducts>::run(p); }
#else
int masked_attention_fwd_amx(const MaskedAttentionParams& p) { return Forward<AmxProducts>::run(p); }
int masked_attention_bwd_amx(const MaskedAttentionParams& p) { return Backward<AmxProducts>::run(p); }
#endif

}  // namespace lam
