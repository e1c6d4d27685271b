// Runs the CUDA kernels on the emulation, without torch and Python, on the seeded random problems of the sanitizer
// tests.
//
//   driver DTYPE PROBLEMS [FIRST] [races]   DTYPE is f32 or bf16; races: new logical threads for every block
#include "../sanitizers/random_problem.h"
#include "cuda/masked_attention.h"
#include "emulation/cuda_emulation.h"

extern "C" void lam_emulation_device(int processors, int shared_bytes);

// fp16 is bf16 with another matrix instruction: not worth its compile time here.
namespace lam {
namespace cuda {
#define LAM_NOT_LINKED(function, Width)                                         \
  template <>                                                                   \
  const char* function<__half, Width>(const MaskedAttentionCall&, void*) {      \
    return "fp16 is not linked";                                                \
  }
LAM_NOT_LINKED(launch_forward, 64)
LAM_NOT_LINKED(launch_forward, 128)
LAM_NOT_LINKED(launch_backward, 64)
LAM_NOT_LINKED(launch_backward, 128)
}  // namespace cuda
}  // namespace lam

namespace {

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
  auto good = [](const char* error) { return error == nullptr || (std::printf("  %s\n", error), false); };
  const lam::cuda::Device device = lam::cuda::current_device();
  if (!good(lam::cuda::masked_attention_forward(p, device, nullptr))) return false;
  set_gradients(*x);
  const size_t bytes = static_cast<size_t>(lam::cuda::masked_attention_backward_bytes(p, device));
  const std::unique_ptr<char[]> scratch(new char[bytes]);
  std::memset(scratch.get(), 0xff, bytes);
  if (!good(lam::cuda::masked_attention_backward(p, device, scratch.get(), nullptr))) return false;
  return all_close(*x, dtype);
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
