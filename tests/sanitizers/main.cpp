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

// The result against a loop in double; gradients are written and hold no NaN, their values are the op's own tests'.
template <class T>
bool run_score_masked(lam::Level level, const Problem& x, Random& r, int64_t number) {
  lam::ScoreMaskedAttentionParams p{};
  static_cast<lam::MaskedAttentionParams&>(p) = x.p;
  Half half = make_half(r, p);
  half.enter(p);
  constexpr int64_t kHidden[] = {1, 5, 16, 33};
  std::vector<int64_t> widths{p.Lk};
  for (int64_t l = r.below(4); l > 0; --l) widths.push_back(r.pick(kHidden));
  widths.push_back(p.Lk);
  size_t count = 0;
  for (size_t l = 1; l < widths.size(); ++l) count += static_cast<size_t>((widths[l - 1] + 1) * widths[l]);
  const std::unique_ptr<T[]> parameters(new T[count]), grads(new T[count]);
  for (size_t k = 0; k < count; ++k) parameters[k] = static_cast<T>(r.below(129) - 64) / 256, grads[k] = NAN;
  p.multiply = number % 2 == 0, p.mean = number / 2 % 2 == 0;
  p.layers = static_cast<int64_t>(widths.size()) - 1, p.widths = widths.data();
  p.parameters = parameters.get(), p.grad_parameters = grads.get();
  announce("score_masked_attention", p.query.dtype, number, p);
  if (lam::kernels(p.query.dtype, level).score_masked_attention_fwd(p) != 0) return false;
  if (lam::kernels(p.query.dtype, level).score_masked_attention_bwd(p) != 0) return false;
  for (size_t k = 0; k < count; ++k)
    if (std::isnan(grads[k])) return std::puts("a gradient of the network is NaN"), false;
  for (const Operand* grad : {&x.grad_query, &x.grad_key, &x.grad_value})
    if (grad->memory && !same_numbers(*grad, *grad, 0)) return std::puts("a gradient is NaN"), false;

  const auto visible = [&](int64_t b, int64_t j) { return !x.key_mask || x.key_mask[static_cast<size_t>(b * p.Lk + j)]; };
  const auto score = [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t d = 0; d < p.D; ++d) sum += p.scale * x.query.get(b, h, i, d) * x.key.get(b, h, j, d);
    return sum;
  };
  std::vector<double> out(static_cast<size_t>(p.B * p.H * p.Lq * p.Dv));
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t i = 0; i < p.Lq; ++i) {
        std::vector<double> mask(static_cast<size_t>(p.Lk)), weight(mask.size());
        for (int64_t j = 0; j < p.Lk; ++j)
          for (int64_t g = p.mean ? 0 : h; visible(b, j) && g < (p.mean ? p.H : h + 1); ++g)
            mask[static_cast<size_t>(j)] += score(b, g, i, j) / static_cast<double>(p.mean ? p.H : 1);
        const T* at = parameters.get();
        for (size_t l = 1; l < widths.size(); ++l) {
          const auto in = static_cast<size_t>(widths[l - 1]), to = static_cast<size_t>(widths[l]);
          std::vector<double> next(at + in * to, at + (in + 1) * to);
          for (size_t k = 0; k < in; ++k)
            for (size_t c = 0; c < to; ++c) next[c] += (l > 1 ? std::max(mask[k], 0.0) : mask[k]) * at[k * to + c];
          mask = next, at += (in + 1) * to;
        }
        double sum = 0;
        for (int64_t j = 0; j < p.Lk; ++j) {
          const double s = score(b, h, i, j), m = mask[static_cast<size_t>(j)];
          weight[static_cast<size_t>(j)] = visible(b, j) ? std::exp(p.multiply ? s * m : s + m) : 0;
          sum += weight[static_cast<size_t>(j)];
        }
        for (int64_t j = 0; sum > 0 && j < p.Lk; ++j)
          for (int64_t d = 0; d < p.Dv; ++d)
            out[flat(half.out, b, h, i, d)] += weight[static_cast<size_t>(j)] / sum * x.value.get(b, h, j, d);
      }
  return close("out", half.out, out, unit_roundoff(p.query.dtype));
}

bool run_score_masked(lam::Level level, DType dtype, int64_t number) {
  Random r = generator_of(number);
  const std::unique_ptr<Problem> x = random_problem(r, dtype);
  set_gradients(*x);
  if (x->p.H != x->p.Hkv || x->p.Lk > 128) return true;
  return dtype == DType::f64 ? run_score_masked<double>(level, *x, r, number)
                             : run_score_masked<float>(level, *x, r, number);
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
        for (bool (*const op)(lam::Level, DType, int64_t) : {run, run_global_local, run_map_gated, run_score_masked})
          if (!op(level, dtype, number)) ++failures, std::puts("FAILED");
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
  }
  return std::puts("no such level"), 2;
}
