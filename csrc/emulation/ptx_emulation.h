// The inline-PTX wrappers of csrc/cuda/ptx.cuh for a host compiler, one function a wrapper.
#pragma once
#include "emulation/cuda_emulation.h"

namespace ptx {
namespace detail {

using emulation::block;
using emulation::fail;
using emulation::Warp;

// Seen by ThreadSanitizer as the thread's own stores; a memset would not be.
inline void fill16(void* to, uint64_t value) {
  volatile uint64_t* word = static_cast<volatile uint64_t*>(to);
  word[0] = value, word[1] = value;
}

inline float as_float(uint32_t half_word, __nv_bfloat16) {
  const uint32_t bits = half_word << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float as_float(uint32_t half_word, __half) {
  const uint32_t sign = (half_word & 0x8000u) << 16, exponent = half_word >> 10 & 31, fraction = half_word & 1023;
  uint32_t bits;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  } else {
    bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  }
  std::memcpy(&value, &bits, 4);
  return value;
}

// Gives each lane its part of N 8x8 matrices, whose rows lie in the slot as lanes 8 m + row deposited them.
EMULATION_UNSEEN inline void distribute(const Warp::Slot& all, unsigned lane, int n, bool transposed, uint32_t* out) {
  auto element = [&](int matrix, unsigned row, unsigned column) -> uint32_t {
    return all.word[static_cast<unsigned>(matrix) * 8 + row][column / 2] >> (16 * (column & 1)) & 0xFFFF;
  };
  for (int m = 0; m < n; ++m) {
    const unsigned a = lane / 4, b = 2 * (lane % 4);
    out[m] = transposed ? element(m, b, a) | element(m, b + 1, a) << 16 : element(m, a, b) | element(m, a, b + 1) << 16;
  }
  if (lane != 0) return;
  for (int m = 0; m < n; ++m) {
    unsigned count[8] = {}, most = 0;  // the 8 rows of a matrix come from 8 groups of 4 banks
    for (int row = 0; row < 8; ++row) {
      const unsigned group = all.word[m * 8 + row][4] >> 4 & 7;
      if (++count[group] > most) most = count[group];
    }
    ++emulation::counters.ldmatrix, emulation::counters.ldmatrix_conflicts += most - 1;
  }
}

EMULATION_UNSEEN inline void put_row(Warp::Slot& slot, unsigned lane, const uint32_t (&row)[4], uintptr_t address) {
  for (int k = 0; k < 4; ++k) slot.word[lane][k] = row[k];
  slot.word[lane][4] = static_cast<uint32_t>(address);
}

// The lane that names a row reads it, so that a sanitizer blames the right reader.
inline void ldmatrix(uint32_t (&out)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) & 15) fail("ldmatrix: a row address that is no multiple of 16");
  if (!emulation::is_shared(row, 16)) fail("ldmatrix: a row outside of shared memory");
  const uint32_t* words = static_cast<const uint32_t*>(row);
  const uint32_t copy[4] = {words[0], words[1], words[2], words[3]};
  put_row(emulation::deposit(), emulation::lane_id(), copy, reinterpret_cast<uintptr_t>(row));
  const Warp::Slot& all = emulation::collective(transposed ? "ldmatrix.trans" : "ldmatrix", ~0u);
  distribute(all, emulation::lane_id(), 4, transposed, out);
}

inline void deliver(size_t groups_kept) {
  std::vector<emulation::Copy> now;
  {
    emulation::Unseen unseen;
    emulation::Fiber& me = *block.current;
    if (me.groups.size() <= groups_kept) return;
    const size_t groups = me.groups.size() - groups_kept, end = me.groups[groups - 1];
    now.assign(me.copies.begin(), me.copies.begin() + static_cast<ptrdiff_t>(end));
    me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<ptrdiff_t>(end));
    me.groups.erase(me.groups.begin(), me.groups.begin() + static_cast<ptrdiff_t>(groups));
    for (size_t& group : me.groups) group -= end;
  }
  for (const emulation::Copy& copy : now) {
    volatile char* to = static_cast<volatile char*>(copy.to);
    const volatile char* from = static_cast<const volatile char*>(copy.from);
    if (copy.bytes == 16) {
      for (int k = 0; k < 2; ++k)
        reinterpret_cast<volatile uint64_t*>(copy.to)[k] = reinterpret_cast<const volatile uint64_t*>(copy.from)[k];
      continue;
    }
    fill16(copy.to, 0);
    for (int k = 0; k < copy.bytes; ++k) to[k] = from[k];
  }
}

}  // namespace detail

// cp.async.cg.shared.global 16, bytes: the destination is poisoned at once (a reader still at the old data loses) and
// written when it is waited for (a reader that is too early loses). What `bytes` leaves of the 16 becomes 0.
inline void cp_async16(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) & 15) detail::fail("cp.async: a destination that is no multiple of 16");
  if (bytes < 0 || bytes > 16) detail::fail("cp.async: %d bytes", bytes);
  if (reinterpret_cast<uintptr_t>(from) & 15) detail::fail("cp.async: a source that is no multiple of 16");
  if (!emulation::is_shared(to, 16)) detail::fail("cp.async: a destination outside of shared memory");
  if (bytes) (void)static_cast<const volatile char*>(from)[0], (void)static_cast<const volatile char*>(from)[bytes - 1];
  detail::fill16(to, ~uint64_t{0});
  emulation::Unseen unseen;
  ++emulation::counters.cp_async, emulation::counters.cp_async_bytes += static_cast<uint64_t>(bytes);
  detail::block.current->copies.push_back({to, from, bytes, 16});
}
inline void cp_async_commit() {
  emulation::Unseen unseen;
  emulation::Fiber& me = *detail::block.current;
  me.groups.push_back(me.copies.size());
}
template <int Kept>
inline void cp_async_wait() {
  detail::deliver(Kept);
}

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) { detail::ldmatrix(out, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) { detail::ldmatrix(out, row, true); }

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32. Hardware adds in another order and rounds the sum its own way: equal
// bit for bit only where every partial sum is exact.
template <class T>
EMULATION_UNSEEN inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned lane = emulation::lane_id();
  {
    emulation::Warp::Slot& mine = emulation::deposit();
    for (int k = 0; k < 8; ++k) mine.a[lane][k] = detail::as_float(a[k / 2] >> 16 * (k & 1) & 0xFFFF, T());
    for (int k = 0; k < 4; ++k) mine.b[lane][k] = detail::as_float(b[k / 2] >> 16 * (k & 1) & 0xFFFF, T());
  }
  const emulation::Warp::Slot& all = emulation::collective("mma.sync", ~0u);
  if (lane == 0) ++emulation::counters.mma;
  const unsigned row = lane / 4, column = 2 * (lane % 4);
  for (unsigned half = 0; half < 2; ++half)      // rows `row` and `row + 8`
    for (unsigned j = 0; j < 2; ++j) {           // columns `column` and `column + 1`
      float sum = d[2 * half + j];
      for (unsigned quad = 0; quad < 4; ++quad) {  // depths 2 quad, 2 quad + 1, 2 quad + 8, 2 quad + 9
        const float* x = all.a[row * 4 + quad];
        const float* y = all.b[(column + j) * 4 + quad];
        sum += x[2 * half] * y[0];
        sum += x[2 * half + 1] * y[1];
        sum += x[4 + 2 * half] * y[2];
        sum += x[4 + 2 * half + 1] * y[3];
      }
      d[2 * half + j] = sum;
    }
}

// Plain accesses of shared memory whose bank conflicts are worth counting.
template <class T>
inline T shared_load(const T* address) {
  if (emulation::options.count_banks) emulation::count_access(address, sizeof(T));
  return *address;
}
template <class T>
inline void shared_store(T* address, T value) {
  if (emulation::options.count_banks) emulation::count_access(address, sizeof(T));
  *address = value;
}

}  // namespace ptx
