// One worker's scratch memory, cut into arrays.
#pragma once
#include <cstdint>

#include "rows.h"
#include "scratch.h"

namespace lam {
namespace {

// Runs twice: with base == nullptr it only counts.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

struct ScratchBlock {
  void* data;
  explicit ScratchBlock(int64_t bytes) : data(scratch_acquire(bytes)) {}
  ~ScratchBlock() { scratch_release(data); }
  ScratchBlock(const ScratchBlock&) = delete;
  ScratchBlock& operator=(const ScratchBlock&) = delete;
};

// Runs body(worker, task) for every task on at most num_threads workers, each with memory of its own. The order of
// tasks is free: no result may depend on it.
template <class Body>
void run_tasks(const MaskedAttentionParams& p, int64_t tasks, const Body& body) {
  struct Context {
    const Body* body;
    int64_t tasks;
    int64_t next;
  } context{&body, tasks, 0};
  const int64_t workers = p.num_threads < tasks ? p.num_threads : tasks;
  p.parallel_for(
      workers,
      [](void* ctx, int64_t worker) {
        Context& c = *static_cast<Context*>(ctx);
        for (int64_t t; (t = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED)) < c.tasks;) (*c.body)(worker, t);
      },
      &context);
}

}  // namespace
}  // namespace lam
