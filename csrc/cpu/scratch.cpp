#include "scratch.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>

namespace lam {
namespace {

struct Block {  // lies in the 64 bytes before the memory that is handed out
  int64_t bytes;
  Block* next;
};
constexpr int64_t kHeader = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;
// A block serves what needs at least half of it: a small request must not hold a large block.
constexpr int64_t kMaxCachedBytes = int64_t{192} << 20;

Block* cached = nullptr;
int64_t cached_bytes = 0;
std::atomic_flag busy = ATOMIC_FLAG_INIT;

// Never waits: a child that was forked while another thread held the lock must not hang, it only caches nothing.
struct TryLock {
  bool held = !busy.test_and_set(std::memory_order_acquire);
  ~TryLock() {
    if (held) busy.clear(std::memory_order_release);
  }
};

}  // namespace

void* scratch_acquire(int64_t bytes) {
  {
    TryLock lock;
    if (lock.held) {
      Block** best = nullptr;
      for (Block** at = &cached; *at != nullptr; at = &(*at)->next)
        if ((*at)->bytes >= bytes && (*at)->bytes / 2 <= bytes && (best == nullptr || (*at)->bytes < (*best)->bytes)) best = at;
      if (best != nullptr) {
        Block* block = *best;
        *best = block->next;
        cached_bytes -= block->bytes;
        return reinterpret_cast<char*>(block) + kHeader;
      }
    }
  }
  const int64_t align = bytes >= kHugePage ? kHugePage : kHeader;
  int64_t total = (bytes + kHeader + kHeader - 1) / kHeader * kHeader;
  // Most of a huge page is worth the rest of it; a result of whole huge pages and its header are not.
  if (bytes >= kHugePage && total % kHugePage > kHugePage / 2) total = (total + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = nullptr;
  if (posix_memalign(&memory, static_cast<size_t>(align), static_cast<size_t>(total)) != 0) return nullptr;
  if (total >= kHugePage) madvise(memory, static_cast<size_t>(total / kHugePage * kHugePage), MADV_HUGEPAGE);
  Block* block = static_cast<Block*>(memory);
  block->bytes = total - kHeader;
  return static_cast<char*>(memory) + kHeader;
}

void scratch_release(void* memory) {
  if (memory == nullptr) return;
  Block* block = reinterpret_cast<Block*>(static_cast<char*>(memory) - kHeader);
  TryLock lock;
  if (lock.held && cached_bytes + block->bytes <= kMaxCachedBytes) {
    block->next = cached;
    cached = block;
    cached_bytes += block->bytes;
    return;
  }
  free(block);
}

int64_t scratch_trim() {
  TryLock lock;
  if (!lock.held) return 0;
  const int64_t bytes = cached_bytes;
  while (cached != nullptr) {
    Block* block = cached;
    cached = block->next;
    free(block);
  }
  cached_bytes = 0;
  return bytes;
}

}  // namespace lam
