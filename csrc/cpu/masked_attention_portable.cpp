// Level "portable": any CPU, and float64 on every CPU.
#include "masked_attention_backward.h"
#include "vec_portable.h"

namespace lam {

int masked_attention_fwd_portable(const MaskedAttentionParams& p) {
  return p.query.dtype == DType::f64 ? Forward<FmaProducts<VecPortable<double>>>::run(p) : Forward<FmaProducts<VecPortable<float>>>::run(p);
}
int masked_attention_bwd_portable(const MaskedAttentionParams& p) {
  return p.query.dtype == DType::f64 ? Backward<FmaProducts<VecPortable<double>>>::run(p) : Backward<FmaProducts<VecPortable<float>>>::run(p);
}

}  // namespace lam
