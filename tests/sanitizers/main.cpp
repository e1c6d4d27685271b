// Runs the CPU kernels without torch and Python on seeded random problems, for AddressSanitizer and UBSan.
//
//   driver LEVEL PROBLEMS            problems 0 ... PROBLEMS - 1 of every type that the level has
//   driver LEVEL PROBLEMS FIRST      problems FIRST ... FIRST + PROBLEMS - 1
#include "cpu/levels.h"
#include "two_map_problem.h"

namespace lam {  // csrc/cpu/scratch.cpp, renamed by the compiler's command line
void* cached_scratch_acquire(int64_t bytes);
void cached_scratch_release(void* block);
int64_t cached_scratch_trim();
}  // namespace lam

namespace {

bool run(lam::Level level, DType dtype, int64_t number) {
  Random r = generator_of(number);
  const std::unique_ptr<Problem> x = random_problem(r, dtype);
  announce(lam::level_name(level), dtype, number, x->p);
  if (lam::kernels(dtype, level).masked_attention_fwd(x->p) != 0) return false;
  set_gradients(*x);
  if (lam::kernels(dtype, level).masked_attention_bwd(x->p) != 0) return false;
  return all_close(*x, dtype);
}

bool run_global_local(lam::Level level, DType dtype, int64_t number) {
  Random r = generator_of(number);
  const std::unique_ptr<Problem> x = random_problem(r, dtype);
  if (!TwoMapProblem::takes(x->p)) return true;
  const lam::LevelKernels& kernels = lam::kernels(dtype, level);
  if (kernels.masked_attention_fwd(x->p) != 0) return false;
  set_gradients(*x);
  const TwoMapProblem both(r, *x);
  announce("global_local_attention", dtype, number, x->p);
  return kernels.global_local_attention_fwd(both.p) == 0 && both.local_half_is(x->out, dtype) &&
         kernels.global_local_attention_bwd(both.p) == 0;
}

bool run_map_gated(lam::Level level, DType dtype, int64_t number) {
  Random r = generator_of(number);
  const std::unique_ptr<Problem> x = random_problem(r, dtype);
  if (!GatedProblem::takes(x->p)) return true;
  set_gradients(*x);
  const GatedProblem gated(r, *x, number % 2 == 0);
  announce("map_gated_attention", dtype, number, gated.p);
  const lam::LevelKernels& kernels = lam::kernels(dtype, level);
  return kernels.map_gated_attention_fwd(gated.p) == 0 && kernels.map_gated_attention_bwd(gated.p) == 0 &&
         gated.all_written();
}

// The kernels above take their scratch memory from tight_scratch.cpp; this is the cache that the library has.
bool scratch_cache_works() {
  constexpr int64_t kSizes[] = {1, 64, 65, 1000, int64_t{2} << 20, (int64_t{2} << 20) + 1};
  std::vector<char*> blocks;
  for (int round = 0; round < 2; ++round) {
    for (const int64_t bytes : kSizes) {
      char* block = static_cast<char*>(lam::cached_scratch_acquire(bytes));
      if (block == nullptr || reinterpret_cast<uintptr_t>(block) % 64 != 0) return false;
      std::memset(block, round, static_cast<size_t>(bytes));
      blocks.push_back(block);
    }
    for (char* block : blocks) lam::cached_scratch_release(block);
    blocks.clear();
  }
  return lam::cached_scratch_trim() > 0 && lam::cached_scratch_trim() == 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fputs("usage: driver LEVEL PROBLEMS [FIRST]\n", stderr), 2;
  const int64_t count = std::atol(argv[2]), first = argc > 3 ? std::atol(argv[3]) : 0;
  int failures = scratch_cache_works() ? 0 : (std::puts("FAILED: the scratch cache"), 1);
  for (int i = 0; i < lam::kLevels; ++i) {
    const lam::Level level = static_cast<lam::Level>(i);
    if (std::strcmp(argv[1], lam::level_name(level)) != 0) continue;
    if (!lam::level_available(level)) return std::puts("this machine cannot run that level"), 3;
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      const bool tiles = level == lam::Level::amx || level == lam::Level::amx_emulated;
      if (tiles ? dtype != DType::bf16 : dtype == DType::f64 && level != lam::Level::portable) continue;
      for (int64_t number = first; number < first + count; ++number)
        for (const auto op : {run, run_global_local, run_map_gated})
          if (!op(level, dtype, number)) ++failures, std::puts("FAILED");
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
  }
  return std::puts("no such level"), 2;
}
