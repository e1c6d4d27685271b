// Philox4x32-10 (Salmon et al., SC 2011): the counter-based generator behind dropout, the same in every backend.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LAM_PHILOX_FN static __host__ __device__ inline
#else
#define LAM_PHILOX_FN [[maybe_unused]] static inline
#endif

namespace lam {

struct Philox4 {
  uint32_t word[4];
};

LAM_PHILOX_FN Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A pair is kept where its word is not below this.
LAM_PHILOX_FN uint32_t dropout_threshold(double dropout_p) { return static_cast<uint32_t>(dropout_p * 4294967296.0); }

}  // namespace lam
