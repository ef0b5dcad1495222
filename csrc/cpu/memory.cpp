#include "moekernels/memory.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

namespace moekernels {
namespace {

size_t round_up_to(size_t n, size_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Eight sizes from each power of two to the next: arrays of about the same size share blocks, and at most an eighth of
// a block of 16 MB or more is left unused.
size_t block_size(size_t num_bytes) {
  const size_t step = std::bit_floor(num_bytes) / 8;
  return round_up_to(num_bytes, step > kHugePage ? step : kHugePage);
}

void* map_block(size_t size) {
  const size_t mapped = size + kHugePage;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(memory);
  const size_t before = round_up_to(reinterpret_cast<uintptr_t>(begin), kHugePage) - reinterpret_cast<uintptr_t>(begin);
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(begin + before + size, kHugePage - before);
  (void)madvise(begin + before, size, MADV_HUGEPAGE);  // advice: refused, nothing is lost
  return begin + before;
}

class Blocks {
 public:
  static Blocks& get() {
    static Blocks* blocks = new Blocks;  // never destroyed: tensors may outlive every static object
    return *blocks;
  }

  void* take(size_t size) {
    std::vector<Block> surplus;  // kept blocks of other sizes make room
    {
      const std::lock_guard lock(mutex_);
      usage_.in_use += size;
      if (usage_.in_use > usage_.most_in_use) usage_.most_in_use = usage_.in_use;
      for (size_t i = kept_.size(); i-- > 0;) {  // the last one first: it may still be in the cache
        if (kept_[i].size == size) return take_out(i);
      }
      while (!kept_.empty() && usage_.in_use + usage_.kept > limit()) surplus.push_back(take_oldest());
    }
    unmap(surplus);
    void* memory = map_block(size);
    if (memory == nullptr && release() > 0) memory = map_block(size);
    if (memory == nullptr) {
      const std::lock_guard lock(mutex_);
      usage_.in_use -= size;
    }
    return memory;
  }

  void give_back(void* memory, size_t size) {
    // The pages stay until the system needs them, so taking the block again costs nothing.
    (void)madvise(memory, size, MADV_FREE);
    const std::lock_guard lock(mutex_);
    kept_.push_back({memory, size});
    usage_.in_use -= size;
    usage_.kept += size;
  }

  size_t release() {
    std::vector<Block> blocks;
    {
      const std::lock_guard lock(mutex_);
      blocks.swap(kept_);
      usage_.kept = 0;
      usage_.most_in_use = usage_.in_use;
    }
    return unmap(blocks);
  }

  BlockUsage usage() {
    const std::lock_guard lock(mutex_);
    return usage_;
  }

 private:
  struct Block {
    void* memory;
    size_t size;
  };

  // A child of fork must not inherit a lock that nobody in it will release.
  Blocks() {
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
  }

  // Of all blocks together. A step of training never needs all of its sizes at once, but each of them in every step.
  size_t limit() const { return usage_.most_in_use + usage_.most_in_use / 2; }

  void* take_out(size_t i) {
    void* memory = kept_[i].memory;
    usage_.kept -= kept_[i].size;
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
    return memory;
  }

  Block take_oldest() {
    const Block oldest = kept_.front();
    take_out(0);
    return oldest;
  }

  static size_t unmap(const std::vector<Block>& blocks) {
    size_t num_bytes = 0;
    for (const Block& block : blocks) {
      munmap(block.memory, block.size);
      num_bytes += block.size;
    }
    return num_bytes;
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  BlockUsage usage_{};
};

bool is_on() {
  static const bool on = [] {
    const char* setting = std::getenv("MOEKERNELS_KEEP_MEMORY");
    return setting == nullptr || std::strcmp(setting, "off") != 0;
  }();
  return on;
}

}  // namespace

void* take_block(size_t num_bytes) {
  return num_bytes >= kHugePage && is_on() ? Blocks::get().take(block_size(num_bytes)) : nullptr;
}

void give_back_block(void* block, size_t num_bytes) {
  Blocks::get().give_back(block, block_size(num_bytes));
}

size_t release_kept_blocks() {
  return Blocks::get().release();
}

BlockUsage block_usage() {
  return Blocks::get().usage();
}

}  // namespace moekernels

#else

namespace moekernels {

void* take_block(size_t) {
  return nullptr;
}
void give_back_block(void*, size_t) {}
size_t release_kept_blocks() {
  return 0;
}
BlockUsage block_usage() {
  return {};
}

}  // namespace moekernels

#endif
