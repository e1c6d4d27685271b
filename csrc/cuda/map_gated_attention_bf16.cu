// The kernels of map_gated_attention in one dtype. Compiled by nvcc, and by a host compiler for the emulation.
#include "cuda/map_gated_attention_backward.cuh"
#include "cuda/map_gated_attention_forward.cuh"

namespace lam {
namespace cuda {

#define LAM_WIDTH(Width)                                                                \
  template const char* launch_map_gated_forward<__nv_bfloat16, Width>(const MapGatedCall&, void*);  \
  template const char* launch_map_gated_backward<__nv_bfloat16, Width>(const MapGatedCall&, void*);
LAM_WIDTH(64)
LAM_WIDTH(128)

}  // namespace cuda
}  // namespace lam
