// What the planners of the ops share.
#pragma once
#include "cuda/masked_attention.h"

// The kernels' half types by names that a file without CUDA headers can use.
struct __nv_bfloat16;
struct __half;

namespace lam {
namespace cuda {

using Bf16 = ::__nv_bfloat16;
using Half = ::__half;

inline int ceil_div(int64_t x, int64_t y) { return static_cast<int>((x + y - 1) / y); }
inline int round_up(int64_t x, int64_t y) { return ceil_div(x, y) * static_cast<int>(y); }

inline int element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// An odd number of 16-byte steps: eight rows then lie in eight different groups of banks.
inline int pitch_of(int64_t width, DType dtype) { return round_up(width, 16) + 16 / element_bytes(dtype); }

struct Filler {
  int bytes = 0;
  int add(int64_t wanted) {
    const int at = bytes;
    bytes += round_up(wanted, 16);
    return at;
  }
};

// Rows over equally large blocks of at most 16 * kMaxWarps.
inline int row_warps(int64_t rows) { return ceil_div(ceil_div(rows, ceil_div(rows, 16 * kMaxWarps)), 16); }

inline bool aligned_rows(const View& v, int size) {
  auto whole = [&](int64_t stride) { return stride * size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && whole(v.stride[0]) && whole(v.stride[1]) &&
         whole(v.stride[2]);
}

inline int64_t padded(int64_t floats) { return (floats + 63) / 64 * 64; }

constexpr const char* kNoRoom = "a block's tiles do not fit the shared memory of this GPU: use backend=\"triton\"";
constexpr const char* kTooMany = "the patterns do not fit a kernel's parameters";

// Operands, patterns and alignment. False: the patterns do not fit.
bool fill_call(MaskedAttentionCall& c, const MaskedAttentionParams& p);

// Direction::run of the call's dtype and width.
template <class Direction, int Width, class Call>
const char* run_for_dtype(DType dtype, const Call& c, void* stream) {
  switch (dtype) {
    case DType::f32:
      return Direction::template run<float, Width>(c, stream);
    case DType::bf16:
      return Direction::template run<Bf16, Width>(c, stream);
    default:
      return Direction::template run<Half, Width>(c, stream);
  }
}
template <class Direction, class Call>
const char* run(const MaskedAttentionParams& p, const Call& c, void* stream) {
  const bool narrow = p.D <= 64 && p.Dv <= 64;
  return narrow ? run_for_dtype<Direction, 64>(p.query.dtype, c, stream)
                : run_for_dtype<Direction, 128>(p.query.dtype, c, stream);
}

}  // namespace cuda
}  // namespace lam
