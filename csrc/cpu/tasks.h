// How the tasks of a call are shared out to threads, and how one waits for another.
#pragma once
#include <sched.h>

#include <cstdint>
#include <cstring>

#include "arena.h"

namespace lam {
namespace {

// Runs body(worker, task) for every task on at most num_threads workers, each with memory of its own. Tasks are
// handed out in the order of their numbers; no result may depend on who takes which.
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

// Tasks of one run_tasks that wait for others with smaller numbers, which were handed out before them.
class Turns {
 public:
  explicit Turns(int64_t tasks) : finished_(tasks) {
    if (ok()) memset(finished_.data, 0, static_cast<size_t>(tasks));
  }
  bool ok() const { return finished_.data != nullptr; }
  void finish(int64_t task) { __atomic_store_n(at(task), 1, __ATOMIC_RELEASE); }
  void wait_for(int64_t task) {
    while (__atomic_load_n(at(task), __ATOMIC_ACQUIRE) == 0) sched_yield();
  }

 private:
  char* at(int64_t task) { return static_cast<char*>(finished_.data) + task; }
  ScratchBlock finished_;
};

}  // namespace
}  // namespace lam
