// The kernels of masked_attention in one dtype. Compiled by nvcc, and by a host compiler for the emulation.
#include "cuda/masked_attention_backward.cuh"
#include "cuda/masked_attention_forward.cuh"

namespace lam {
namespace cuda {

#define LAM_WIDTH(Width)                                                                           \
  template const char* launch_forward<__half, Width>(const MaskedAttentionCall&, void*);    \
  template const char* launch_backward<__half, Width>(const MaskedAttentionCall&, void*);
LAM_WIDTH(64)
LAM_WIDTH(128)

}  // namespace cuda
}  // namespace lam
