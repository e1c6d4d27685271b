// What the planner needs to know about the GPU.
#if !defined(__CUDACC__)
#define EMULATION_IMPLEMENTATION
#include <utility>
#endif
#include "cuda/masked_attention.h"
#include "cuda/ptx.cuh"

namespace lam {
namespace cuda {

#if defined(__CUDACC__)
Device current_device() {
  constexpr int kKnown = 16;
  static thread_local Device known[kKnown];  // asking takes as long as a launch
  int id = 0;
  cudaGetDevice(&id);
  if (id < kKnown && known[id].processors > 0) return known[id];
  Device d{};
  cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, id);
  cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  cudaDeviceGetAttribute(&d.processor_shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
  if (id < kKnown) known[id] = d;
  return d;
}
#else
namespace {
// Few processors, so that a block's slice has several pairs.
Device emulated{4, 232448, 233472};
}  // namespace
Device current_device() { return emulated; }

// For tests, by ctypes.
#define LAM_TEST_FUNCTION extern "C" __attribute__((visibility("default")))

#if !defined(LAM_EMULATION_STAMP)
#define LAM_EMULATION_STAMP ""
#endif
// The sources that the library was compiled from (lam_kernels/ops/_sources.py).
LAM_TEST_FUNCTION const char* lam_emulation_stamp() { return LAM_EMULATION_STAMP; }
// Other sizes lead to other plans: streaming, smaller blocks, more slices.
LAM_TEST_FUNCTION void lam_emulation_device(int processors, int shared_bytes) {
  emulated = {processors, shared_bytes, shared_bytes + 1024};
  emulation::options.shared_bytes_limit = static_cast<size_t>(shared_bytes);
}
// Rows of a block, stages, chunks of keys and bytes of shared memory of a plan: docs/cuda_kernels.md.
LAM_TEST_FUNCTION void lam_emulation_layout(int dtype, int Lq, int Lk, int D, int Dv, int backward, int shared_bytes,
                                            int* plan) {
  MaskedAttentionParams p{};
  p.B = p.H = p.Hkv = 1, p.Lq = Lq, p.Lk = Lk, p.D = D, p.Dv = Dv;
  p.query.dtype = static_cast<DType>(dtype);
  p.multiplier.data = plan, p.multiplier.stride[2] = p.multiplier.stride[3] = 1;  // a full tile
  const Layout l = row_layout(p, {132, shared_bytes, shared_bytes}, {false, backward != 0, backward != 0, false});
  plan[0] = 16 * l.warps, plan[1] = l.stages, plan[2] = l.chunks, plan[3] = l.bytes;
}
LAM_TEST_FUNCTION void lam_emulation_schedule(uint64_t seed, int order) {
  emulation::options.seed = seed;
  emulation::options.order = static_cast<emulation::Order>(order);
}
// Counts from zero; bank conflicts of plain accesses only where they are wanted.
LAM_TEST_FUNCTION void lam_emulation_count_banks(int on) {
  emulation::options.count_banks = on != 0;
  emulation::counters = {};
}
LAM_TEST_FUNCTION uint64_t lam_emulation_counter(const char* name) {
  const emulation::Counters& c = emulation::counters;
  const std::pair<const char*, uint64_t> all[] = {
      {"launches", c.launches},
      {"blocks", c.blocks},
      {"mma", c.mma},
      {"ldmatrix", c.ldmatrix},
      {"ldmatrix_conflicts", c.ldmatrix_conflicts},
      {"cp_async", c.cp_async},
      {"cp_async_bytes", c.cp_async_bytes},
      {"shared_accesses", c.shared_accesses},
      {"shared_conflicts", c.shared_conflicts},
  };
  for (const auto& [known, count] : all)
    if (std::strcmp(known, name) == 0) return count;
  return ~uint64_t{0};
}
#endif

}  // namespace cuda
}  // namespace lam
