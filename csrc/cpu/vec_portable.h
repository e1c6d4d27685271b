// SIMD words in GCC vector extensions: runs on any CPU the compiler targets, float and double.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace lam {
namespace {

template <class Scalar>
struct VecPortable {
  using T = Scalar;
  static constexpr int W = 16 / sizeof(T);
  typedef T reg __attribute__((vector_size(16)));
  struct mask {
    uint32_t bits;
  };
  static constexpr int kRows = 4, kCols = 2;  // register tile of the matrix product, in rows x words

  static reg set1(T x) { return x - reg{}; }
  static reg zero() { return reg{}; }
  static reg load(const T* p) {
    reg r;
    memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(T* p, reg r) { memcpy(p, &r, sizeof r); }
  static mask from_bits(uint32_t bits) { return {bits}; }
  static mask both(mask m, mask n) { return {m.bits & n.bits}; }
  static reg load(const T* p, mask m) {
    reg r = zero();
    for (int k = 0; k < W; ++k)
      if (m.bits >> k & 1) r[k] = p[k];
    return r;
  }
  static void store(T* p, reg r, mask m) {
    for (int k = 0; k < W; ++k)
      if (m.bits >> k & 1) p[k] = r[k];
  }
  static reg select(mask m, reg x, reg y) {
    for (int k = 0; k < W; ++k) x[k] = m.bits >> k & 1 ? x[k] : y[k];
    return x;
  }
  static reg keep(mask m, reg x) { return select(m, x, zero()); }
  static mask not_equal(reg x, T y) {
    uint32_t bits = 0;
    for (int k = 0; k < W; ++k) bits |= uint32_t{x[k] != y} << k;
    return {bits};
  }
  static reg add(reg x, reg y) { return x + y; }
  static reg sub(reg x, reg y) { return x - y; }
  static reg mul(reg x, reg y) { return x * y; }
  static reg div(reg x, reg y) { return x / y; }
  static reg fma(reg x, reg y, reg z) { return x * y + z; }
  static reg max(reg x, reg y) { return x > y ? x : y; }
  static T reduce_max(reg x) {
    T m = x[0];
    for (int k = 1; k < W; ++k) m = x[k] > m ? x[k] : m;
    return m;
  }
  static T reduce_add(reg x) {
    T s = x[0];
    for (int k = 1; k < W; ++k) s += x[k];
    return s;
  }
  static reg exp2(reg x) {
    for (int k = 0; k < W; ++k) x[k] = sizeof(T) == 8 ? static_cast<T>(::exp2(x[k])) : static_cast<T>(::exp2f(x[k]));
    return x;
  }
};

}  // namespace
}  // namespace lam
