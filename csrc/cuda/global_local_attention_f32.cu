// The kernels of global_local_attention in one dtype. Compiled by nvcc, and by a host compiler for the emulation.
#include "cuda/global_local_attention_backward.cuh"
#include "cuda/global_local_attention_forward.cuh"

namespace lam {
namespace cuda {

#define LAM_WIDTH(Width)                                                                    \
  template const char* launch_two_map_forward<float, Width>(const MaskedAttentionCall&, void*);  \
  template const char* launch_two_map_backward<float, Width>(const MaskedAttentionCall&, void*);
LAM_WIDTH(64)
LAM_WIDTH(128)

}  // namespace cuda
}  // namespace lam
