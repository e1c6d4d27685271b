// Runs the CUDA kernels on the emulation, without torch and Python, on the seeded random problems of the sanitizer
// tests.
//
//   driver DTYPE PROBLEMS [FIRST] [races]   DTYPE is f32 or bf16, the other ops run in bf16 alone; races: new logical
//                                           threads for every block
#include "../sanitizers/two_map_problem.h"
#include "cuda/map_gated_attention.h"
#include "cuda/masked_attention.h"
#include "emulation/cuda_emulation.h"

extern "C" void lam_emulation_device(int processors, int shared_bytes);

// Not worth their compile time here: fp16 is bf16 with another matrix instruction, and the other ops are made of the
// same tiles and products.
namespace lam {
namespace cuda {
#define LAM_NOT_LINKED(Call, function, T, Width)         \
  template <>                                            \
  const char* function<T, Width>(const Call&, void*) {   \
    return #function " of " #T " is not linked";         \
  }
#define LAM_OP_NOT_LINKED(Call, op, T)                       \
  LAM_NOT_LINKED(Call, launch_##op##forward, T, 64)    \
  LAM_NOT_LINKED(Call, launch_##op##forward, T, 128)   \
  LAM_NOT_LINKED(Call, launch_##op##backward, T, 64)   \
  LAM_NOT_LINKED(Call, launch_##op##backward, T, 128)
LAM_OP_NOT_LINKED(MaskedAttentionCall, , __half)
LAM_OP_NOT_LINKED(MaskedAttentionCall, two_map_, __half)
LAM_OP_NOT_LINKED(MaskedAttentionCall, two_map_, float)
LAM_OP_NOT_LINKED(MapGatedCall, map_gated_, __half)
LAM_OP_NOT_LINKED(MapGatedCall, map_gated_, float)
}  // namespace cuda
}  // namespace lam

namespace {

bool good(const char* error) { return error == nullptr || (std::printf("  %s\n", error), false); }

struct Scratch {
  std::unique_ptr<char[]> memory;
  explicit Scratch(int64_t bytes) : memory(new char[static_cast<size_t>(bytes)]) {
    std::memset(memory.get(), 0xff, static_cast<size_t>(bytes));
  }
};

bool run_global_local(Random& r, Problem& x, const lam::cuda::Device& device) {
  const TwoMapProblem both(r, x);
  if (!good(lam::cuda::global_local_attention_forward(both.p, device, nullptr))) return false;
  if (!both.local_half_is(x.out, DType::bf16)) return false;
  const Scratch scratch(lam::cuda::global_local_attention_backward_bytes(both.p, device));
  return good(lam::cuda::global_local_attention_backward(both.p, device, scratch.memory.get(), nullptr));
}

bool run_map_gated(Random& r, const Problem& x, const lam::cuda::Device& device, bool renormalise) {
  const GatedProblem gated(r, x, renormalise);
  if (!good(lam::cuda::map_gated_attention_forward(gated.p, device, nullptr))) return false;
  const Scratch scratch(lam::cuda::map_gated_attention_backward_bytes(gated.p, device));
  return good(lam::cuda::map_gated_attention_backward(gated.p, device, scratch.memory.get(), nullptr)) &&
         gated.all_written();
}

bool run(DType dtype, int64_t number) {
  Random r = generator_of(number);
  const std::unique_ptr<Problem> x = random_problem(r, dtype);
  lam::MaskedAttentionParams& p = x->p;
  if (*lam::cuda::masked_attention_limits(p)) return true;
  announce("emulated", dtype, number, p);
  emulation::options.seed = static_cast<uint64_t>(number);
  // a large chip, and one whose blocks hold little
  const int shared_bytes = r.chance(50) ? 232448 : 98304;
  lam_emulation_device(r.chance(50) ? 1 : 6, shared_bytes);
  const lam::cuda::Device device = lam::cuda::current_device();
  if (!good(lam::cuda::masked_attention_forward(p, device, nullptr))) return false;
  set_gradients(*x);
  const Scratch scratch(lam::cuda::masked_attention_backward_bytes(p, device));
  if (!good(lam::cuda::masked_attention_backward(p, device, scratch.memory.get(), nullptr))) return false;
  if (!all_close(*x, dtype)) return false;
  if (dtype != DType::bf16) return true;
  if (TwoMapProblem::takes(p) && !run_global_local(r, *x, device)) return false;
  return !GatedProblem::takes(p) || run_map_gated(r, *x, device, number % 2 == 0);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fputs("usage: driver DTYPE PROBLEMS [FIRST] [races]\n", stderr), 2;
  const std::string name = argv[1];
  const DType dtype = name == "f32" ? DType::f32 : DType::bf16;
  const int64_t count = std::atol(argv[2]), first = argc > 3 ? std::atol(argv[3]) : 0;
  emulation::options.new_threads_per_block = argc > 4;
  int failures = 0;
  for (int64_t number = first; number < first + count; ++number)
    if (!run(dtype, number)) ++failures, std::puts("  FAILED");
  return failures ? 1 : 0;
}
