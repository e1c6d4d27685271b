// What one file that is compiled for every level needs to know of it. setup.py defines LAM_LEVEL as the level's name;
// the compiler's flags say which instructions it has.
#pragma once
#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#endif
#include "vec_portable.h"
//
#include "products_fma.h"
#if defined(__AMX_BF16__) || defined(LAM_EMULATE_AMX)
#include "products_amx.h"
#endif

#define LAM_JOIN_NAMES(name, level) name##_##level
#define LAM_JOIN_EXPANDED(name, level) LAM_JOIN_NAMES(name, level)
#define LAM_AT_LEVEL(name) LAM_JOIN_EXPANDED(name, LAM_LEVEL)

namespace lam {
namespace {

#if defined(__AMX_BF16__) || defined(LAM_EMULATE_AMX)
using LevelProducts = AmxProducts;
#elif defined(__AVX512F__)
using LevelProducts = FmaProducts<VecAvx512>;
#elif defined(__AVX2__)
using LevelProducts = FmaProducts<VecAvx2>;
#else
using LevelProducts = FmaProducts<VecPortable<float>>;
#define LAM_LEVEL_HAS_DOUBLE
#endif
using DoubleProducts = FmaProducts<VecPortable<double>>;

}  // namespace
}  // namespace lam
