// Switching between stacks: one fiber a GPU thread, known to AddressSanitizer and ThreadSanitizer.
#pragma once
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

// The emulator's own bookkeeping is no memory traffic of the kernel: ThreadSanitizer must not see it.
#if defined(__SANITIZE_THREAD__)
#define EMULATION_UNSEEN __attribute__((no_sanitize("thread"), noinline))
struct Unseen {
  Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
};
inline void publish(void* where) { __tsan_release(where); }
inline void receive(void* where) { __tsan_acquire(where); }
#else
#define EMULATION_UNSEEN
struct Unseen {
  Unseen() {}
};
inline void publish(void*) {}
inline void receive(void*) {}
#endif

struct Stack {
  char* memory = nullptr;
  size_t bytes = 0;
  bool owned = false;
  void* position = nullptr;  // x86-64: the stack pointer of a fiber that is not running
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  void* sanitizer_thread = nullptr;
  void* sanitizer_stack = nullptr;

  ~Stack() { release(); }
  Stack() = default;
  Stack(Stack&& other) noexcept { *this = static_cast<Stack&&>(other); }
  Stack& operator=(Stack&& other) noexcept {
    release();
    memory = other.memory, bytes = other.bytes, owned = other.owned, sanitizer_thread = other.sanitizer_thread;
    other.memory = nullptr, other.owned = false, other.sanitizer_thread = nullptr;
    return *this;
  }
  void release() {
    if (!owned) return;
    munmap(memory - page(), bytes + page());
#if defined(__SANITIZE_THREAD__)
    if (sanitizer_thread) __tsan_destroy_fiber(sanitizer_thread);
#endif
    memory = nullptr, owned = false, sanitizer_thread = nullptr;
  }
  // ThreadSanitizer refuses to destroy a fiber that ignores accesses, as one does that stopped in the emulator.
  void abandon() {
    sanitizer_thread = nullptr;
#if !defined(__SANITIZE_THREAD__)
    release();
#else
    owned = false, memory = nullptr;
#endif
  }
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

  // The stack of the calling thread, to come back to.
  void adopt_current() {
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &bytes);
    pthread_attr_destroy(&attributes);
    memory = static_cast<char*>(bottom);
#endif
#if defined(__SANITIZE_THREAD__)
    sanitizer_thread = __tsan_get_current_fiber();
#endif
  }

  // A stack that starts `entry` when it is switched to; below it lies a page that faults when the stack overflows.
  bool start(size_t wanted, void (*entry)()) {
    if (memory && bytes != wanted) release();
    if (!memory) {
      void* base = mmap(nullptr, wanted + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1, 0);
      if (base == MAP_FAILED) return false;
      mprotect(base, page(), PROT_NONE);
      memory = static_cast<char*>(base) + page(), bytes = wanted, owned = true;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory, bytes);  // what an earlier fiber left
#endif
#if defined(__SANITIZE_THREAD__)
    if (!sanitizer_thread) sanitizer_thread = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(memory + bytes);
    *--top = nullptr;  // keeps the stack aligned as a call would
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    position = top;
#else
    getcontext(&context);
    context.uc_stack.ss_sp = memory, context.uc_stack.ss_size = bytes, context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
    return true;
  }
};

#if defined(__x86_64__)
extern "C" void lam_emulation_switch(void** save, void* load);
// The six registers that a function must keep (System V ABI), then the other stack.
#define EMULATION_DEFINE_SWITCH                                                                            \
  __asm__(                                                                                                 \
      ".text\n.globl lam_emulation_switch\n.type lam_emulation_switch,@function\nlam_emulation_switch:\n"  \
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"                           \
      "movq %rsp,(%rdi); movq %rsi,%rsp\n"                                                                 \
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret\n"                            \
      ".size lam_emulation_switch,.-lam_emulation_switch\n");
#else
#define EMULATION_DEFINE_SWITCH
#endif

// To be called first on a stack that was just switched to for the first time.
EMULATION_UNSEEN inline void arrived_on_new_stack() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

EMULATION_UNSEEN inline void switch_stack(Stack& from, Stack& to, bool from_ends) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.sanitizer_stack, to.memory, to.bytes);
#else
  (void)from_ends;
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.sanitizer_thread, 1 /* publishes nothing */);
#endif
#if defined(__x86_64__)
  lam_emulation_switch(&from.position, to.position);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer_stack, nullptr, nullptr);
#endif
}

}  // namespace emulation
