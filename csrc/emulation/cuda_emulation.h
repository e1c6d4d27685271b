// Runs CUDA C++ kernels on the host CPU: the threads of a block are fibers, warp operations are collectives.
// Takes the place of the CUDA runtime for a file that g++ compiles; nvcc never sees it. What it finds, what it cannot
// find and how to use it: docs/emulation.md. One source file of a program defines EMULATION_IMPLEMENTATION first.
#pragma once
#if defined(__CUDACC__)
#error "cuda_emulation.h is for host compilers"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/fibers.h"

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
// In a linker section of its own, which is poisoned before every block.
#define __shared__ static __attribute__((section("lam_emulation_shared")))
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
extern "C" {
extern char __start_lam_emulation_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_lam_emulation_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emulation {

enum class Order { random, forward, reverse };  // in which the threads of a block run

struct Options {
  uint64_t seed = 1;
  Order order = Order::random;
  size_t stack_bytes = size_t{128} << 10;
  size_t shared_bytes_limit = 232448;  // of sm_90; 166912 on sm_80
  // New logical threads for each block, so that ThreadSanitizer also sees races between blocks.
  bool new_threads_per_block = false;
  bool count_banks = false;  // of shared_load and shared_store; ldmatrix is always counted
};

struct Counters {
  uint64_t launches = 0, blocks = 0, switches = 0, barriers = 0, collectives = 0;
  uint64_t mma = 0, ldmatrix = 0, ldmatrix_conflicts = 0;  // conflicts: wavefronts beyond the least possible
  uint64_t cp_async = 0, cp_async_bytes = 0;
  uint64_t shared_accesses = 0, shared_conflicts = 0;  // by warps, where count_banks is set
};

// A kernel did what hardware would not forgive; the message names block and thread.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  unsigned x, y, z;
};

struct Copy {  // a cp.async in flight
  void* to;
  const void* from;
  int bytes, width;
};

struct Fiber {
  enum State : uint8_t { runnable, in_collective, at_barrier, done };
  Stack stack;
  unsigned id = 0;
  Index index{};
  State state = done;
  int barrier = 0;
  size_t place = 0;  // in Block::runnable
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // how many of the copies each committed group ends at
  size_t accesses = 0;         // counted ones, see count_access
};

struct Access {
  unsigned lanes = 0;
  int bytes = 0;
  uintptr_t address[32];
};

struct Warp {
  struct Slot {
    alignas(16) uint32_t word[32][8];
    float a[32][8], b[32][4];
  };
  uint32_t arrived = 0, mask = 0, alive = 0;
  unsigned generation = 0;
  const char* operation = nullptr;
  Slot slot[2];  // a lane may be one collective ahead of the slowest
  char order[2];
  std::vector<Access> accesses;
};

struct Barrier {
  unsigned arrived = 0, phase = 0, expected = 0;
  const void* site = nullptr;
  char order[2];
};

// The block that runs, and with it the whole state of the emulator.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> runnable;
  Barrier barriers[16];
  unsigned alive = 0;
  Index block_index{}, block_size{}, grid_size{};
  std::function<void()> body;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  Fiber* current = nullptr;  // null: the host
  Stack host;
  uint64_t random = 1;
  std::string fault;
  char started, ended;
};

inline Options options;
inline Counters counters;
inline Block& block = *new Block;  // never destroyed: a kernel may run while the process ends
inline std::mutex& one_at_a_time = *new std::mutex;

EMULATION_UNSEEN inline void switch_to(Fiber* to) {
  Fiber* from = block.current;
  if (from == to) return;
  block.current = to;
  ++counters.switches;
  switch_stack(from ? from->stack : block.host, to ? to->stack : block.host, from && from->state == Fiber::done);
}

// Ends the launch: the host throws the message, the fibers are left where they are.
[[noreturn]] __attribute__((format(printf, 1, 2), noinline)) inline void fail(const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  if (!block.current) throw Fault(text);
  char where[96];
  snprintf(where, sizeof where, "block (%u,%u,%u) thread %u: ", block.block_index.x, block.block_index.y,
           block.block_index.z, block.current->id);
  block.fault = std::string(where) + text;
  switch_to(nullptr);
  abort();
}

inline void make_runnable(Fiber& fiber) {
  fiber.state = Fiber::runnable;
  fiber.place = block.runnable.size();
  block.runnable.push_back(fiber.id);
}

inline void suspend(Fiber& fiber, Fiber::State state) {
  const unsigned last = block.runnable.back();
  block.runnable[fiber.place] = last;
  block.fibers[last].place = fiber.place;
  block.runnable.pop_back();
  fiber.state = state;
}

// Runs another fiber; returns when this one may go on.
EMULATION_UNSEEN inline void schedule() {
  const size_t n = block.runnable.size();
  if (n == 0) {
    if (block.alive == 0) return switch_to(nullptr);
    unsigned barrier = 0, collective = 0;
    for (const Fiber& f : block.fibers)
      barrier += f.state == Fiber::at_barrier, collective += f.state == Fiber::in_collective;
    fail("deadlock: of %u threads %u wait at a block barrier and %u in a warp operation that not all lanes reach",
         block.alive, barrier, collective);
  }
  size_t chosen = 0;
  if (options.order == Order::random) {
    block.random ^= block.random << 13, block.random ^= block.random >> 7, block.random ^= block.random << 17;
    chosen = (block.random >> 11) % n;
  } else {
    for (size_t k = 1; k < n; ++k)
      if ((block.runnable[k] < block.runnable[chosen]) == (options.order == Order::forward)) chosen = k;
  }
  switch_to(&block.fibers[block.runnable[chosen]]);
}

// bar.sync id, count. A count of 0 means every thread of the block, and then none may have exited.
EMULATION_UNSEEN __attribute__((noinline)) inline void barrier_wait(int id, unsigned count, const void* site) {
  Unseen unseen;
  Barrier& b = block.barriers[id];
  Fiber& me = *block.current;
  const unsigned phase = b.phase;
  publish(&b.order[phase & 1]);
  if (count == 0 && block.alive != block.fibers.size())
    fail("__syncthreads() after %zu threads of the block have exited", block.fibers.size() - block.alive);
  if (count % 32) fail("bar.sync with a count of %u, which is no multiple of 32", count);
  if (b.arrived == 0) b.site = site, b.expected = count;
  else if (b.site != site && id == 0) fail("threads of one block wait at two different __syncthreads()");
  ++b.arrived, ++counters.barriers;
  if (b.arrived == (b.expected ? b.expected : block.alive)) {
    b.arrived = 0, ++b.phase;
    for (Fiber& f : block.fibers)
      if (f.state == Fiber::at_barrier && f.barrier == id) make_runnable(f);
  } else {
    me.barrier = id;
    suspend(me, Fiber::at_barrier);
    schedule();
  }
  receive(&b.order[phase & 1]);
}

EMULATION_UNSEEN inline Warp& my_warp() { return block.warps[block.current->id / 32]; }
EMULATION_UNSEEN inline Warp::Slot& deposit() { return my_warp().slot[my_warp().generation & 1]; }
EMULATION_UNSEEN inline unsigned lane_id() { return block.current->id & 31; }

// A warp operation: every lane of the mask deposits, waits for the others, and then reads what they deposited.
// It orders the lanes' memory accesses only where `orders` says so (__syncwarp), as the CUDA model has it.
EMULATION_UNSEEN __attribute__((noinline)) inline Warp::Slot& collective(const char* operation, uint32_t mask,
                                                                         bool orders = false) {
  Unseen unseen;
  Warp& w = my_warp();
  Fiber& me = *block.current;
  const uint32_t bit = 1u << (me.id & 31);
  const unsigned generation = w.generation;
  if (!(mask & bit)) fail("%s: the mask leaves out the lane itself", operation);
  if (mask & ~w.alive) fail("%s: mask %08x names lanes that exited or do not exist (%08x do)", operation, mask, w.alive);
  if (w.arrived == 0) w.operation = operation, w.mask = mask;
  else if (w.mask != mask || strcmp(w.operation, operation) != 0)
    fail("divergent warp: %s (mask %08x) meets %s (mask %08x)", operation, mask, w.operation, w.mask);
  w.arrived |= bit;
  if (orders) publish(&w.order[generation & 1]);
  if (w.arrived == mask) {
    w.arrived = 0, ++w.generation, ++counters.collectives;
    const unsigned first = me.id & ~31u;
    for (unsigned lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1) && block.fibers[first + lane].state == Fiber::in_collective)
        make_runnable(block.fibers[first + lane]);
  } else {
    suspend(me, Fiber::in_collective);
    schedule();
  }
  if (orders) receive(&w.order[generation & 1]);
  return w.slot[generation & 1];
}

// Wavefronts beyond the least possible when 32 lanes access shared memory together: 128 bytes at a time, 4 a bank.
EMULATION_UNSEEN inline unsigned extra_wavefronts(const Access& access) {
  const unsigned lanes = 128u / static_cast<unsigned>(access.bytes < 4 ? 4 : access.bytes);
  unsigned extra = 0;
  for (unsigned first = 0; first < 32; first += lanes) {
    uintptr_t words[32][32];
    unsigned count[32] = {}, most = 1;
    for (unsigned lane = first; lane < first + lanes && lane < 32; ++lane)
      for (uintptr_t word = access.address[lane] / 4; word * 4 < access.address[lane] + access.bytes; ++word) {
        const unsigned bank = word % 32;
        bool known = false;
        for (unsigned k = 0; k < count[bank]; ++k) known |= words[bank][k] == word;
        if (!known) words[bank][count[bank]++] = word;
        if (count[bank] > most) most = count[bank];
      }
    extra += most - 1;
  }
  return extra;
}

// The n-th counted access of each lane is taken for one access of the warp: right where the warp does not diverge.
EMULATION_UNSEEN __attribute__((noinline)) inline void count_access(const void* address, int bytes) {
  Unseen unseen;
  Warp& w = my_warp();
  const size_t number = block.current->accesses++;
  if (number >= w.accesses.size()) w.accesses.resize(number + 1);
  Access& access = w.accesses[number];
  access.address[lane_id()] = reinterpret_cast<uintptr_t>(address), access.bytes = bytes;
  if (++access.lanes == 32) ++counters.shared_accesses, counters.shared_conflicts += extra_wavefronts(access);
}

EMULATION_UNSEEN inline bool is_shared(const void* address, size_t bytes) {
  const char* p = static_cast<const char*>(address);
  return (p >= block.shared && p + bytes <= block.shared + block.shared_bytes) ||
         (p >= __start_lam_emulation_shared && p + bytes <= __stop_lam_emulation_shared);
}

EMULATION_UNSEEN inline void fiber_main() {
  arrived_on_new_stack();
  Fiber& me = *block.current;
  receive(&block.started);
  block.body();
  publish(&block.ended);
  {
    Unseen unseen;
    if (!me.copies.empty()) fail("the thread exits with cp.async in flight");
    Warp& w = my_warp();
    if (w.arrived) fail("the thread exits while its warp waits in %s", w.operation);
    for (const Barrier& b : block.barriers)
      if (b.arrived && !b.expected) fail("the thread exits while others wait at __syncthreads()");
    suspend(me, Fiber::done);
    --block.alive;
    w.alive &= ~(1u << (me.id & 31));
  }
  schedule();
  abort();
}

// A block's shared memory ends where it ends, so that AddressSanitizer sees an access beyond it; 0xff is NaN in
// every float type.
inline void start_block(Index index, unsigned threads) {
  Unseen unseen;
  Block& b = block;
  ++counters.blocks;
  b.block_index = index, b.alive = threads, b.runnable.clear();
  for (Barrier& barrier : b.barriers) barrier = Barrier{};
  for (Warp& w : b.warps) w.arrived = 0, w.alive = 0, w.accesses.clear();
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, b.shared_bytes ? b.shared_bytes : 1)) fail("no memory for a block");
  b.shared = static_cast<char*>(memory);
  memset(b.shared, 0xff, b.shared_bytes);
  if (__start_lam_emulation_shared)
    memset(__start_lam_emulation_shared, 0xff,
           static_cast<size_t>(__stop_lam_emulation_shared - __start_lam_emulation_shared));
  const Index size = b.block_size;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = b.fibers[t];
    f.id = t, f.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    f.copies.clear(), f.groups.clear(), f.accesses = 0;
    b.warps[t / 32].alive |= 1u << (t & 31);
    if (options.new_threads_per_block) f.stack.release();
    if (!f.stack.start(options.stack_bytes, fiber_main)) fail("no memory for the stack of a thread");
    make_runnable(f);
  }
}

inline void end_block() {
  Unseen unseen;
  free(block.shared);
  block.shared = nullptr;
}

template <class Body>
void launch(Index grid, Index size, size_t shared_bytes, Body body) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const unsigned threads = size.x * size.y * size.z;
  if (threads == 0 || threads > 1024) fail("a block of %u threads", threads);
  if (shared_bytes > options.shared_bytes_limit)
    fail("%zu bytes of dynamic shared memory, the limit is %zu", shared_bytes, options.shared_bytes_limit);
  Block& b = block;
  {
    Unseen unseen;
    ++counters.launches;
    b.fibers.resize(threads);
    b.warps.resize((threads + 31) / 32);
    b.body = body, b.grid_size = grid, b.block_size = size, b.shared_bytes = shared_bytes, b.fault.clear();
    b.random = options.seed * 0x9E3779B97F4A7C15ull | 1;
    b.host.adopt_current();
  }
  publish(&b.started);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        start_block({x, y, z}, threads);
        if (!options.new_threads_per_block) publish(&b.started);
        {
          Unseen unseen;
          schedule();  // returns when every thread is done or one has failed
        }
        end_block();
        if (!b.fault.empty()) {
          for (Fiber& f : b.fibers) f.stack.abandon();  // they stopped anywhere
          throw Fault(b.fault);
        }
        if (!options.new_threads_per_block) receive(&b.ended);
      }
  receive(&b.ended);
  b.body = nullptr;
}

#if defined(EMULATION_IMPLEMENTATION)
EMULATION_DEFINE_SWITCH
#endif

}  // namespace emulation

#include "emulation/cuda_builtins.h"
