#include "moekernels/memory.h"
#include "common/rounding.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <unordered_map>
#include <utility>
#include <vector>

namespace moekernels {
namespace {

// Eight sizes from each power of two to the next: arrays of about the same size share blocks, and at most an eighth of
// a block of 16 MB or more is left unused.
size_t block_size(size_t num_bytes) {
  const size_t step = std::bit_floor(num_bytes) / 8;
  return round_up(num_bytes, step > kHugePage ? step : kHugePage);
}

// Memory that lies in one range but may be several mappings, of which the kernel moves one at a time.
struct Block {
  char* memory = nullptr;
  std::vector<size_t> pieces;  // bytes of each mapping, in order

  size_t size() const { return std::accumulate(pieces.begin(), pieces.end(), size_t{0}); }

  // Cuts off its last bytes.
  Block split(size_t num_bytes) {
    Block tail;
    char* end = memory + size();
    for (size_t left = num_bytes; left > 0;) {
      const size_t part = std::min(left, pieces.back());
      tail.pieces.insert(tail.pieces.begin(), part);
      left -= part;
      if ((pieces.back() -= part) == 0) pieces.pop_back();
    }
    tail.memory = end - num_bytes;
    return tail;
  }

  void unmap() const {
    if (!pieces.empty()) munmap(memory, size());
  }
};

Block map_block(size_t size) {
  const size_t mapped = size + kHugePage;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return {};
  char* begin = static_cast<char*>(memory);
  const size_t before = round_up(reinterpret_cast<uintptr_t>(begin), kHugePage) - reinterpret_cast<uintptr_t>(begin);
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(begin + before + size, kHugePage - before);
  (void)madvise(begin + before, size, MADV_HUGEPAGE);  // advice: refused, nothing is lost
  return {begin + before, {size}};
}

// The same of the pages of other blocks, as far as they go: whole page tables change places, and nothing is cleared.
Block map_block(size_t size, const std::vector<Block>& spare) {
  constexpr size_t kMostPieces = 64;  // smaller ones are not worth a mapping: a process has 65530
  Block block = map_block(size);
  if (block.memory == nullptr) {
    for (const Block& from : spare) from.unmap();
    return map_block(size);
  }
  block.pieces.clear();
  size_t done = 0;
  bool moving = true;
  for (const Block& from : spare) {
    char* source = from.memory;
    for (size_t piece : from.pieces) {
      if (!moving || piece * kMostPieces < size) {
        munmap(source, piece);
      } else if (mremap(source, piece, piece, MREMAP_MAYMOVE | MREMAP_FIXED, block.memory + done) != MAP_FAILED) {
        block.pieces.push_back(piece);
        done += piece;
      } else {
        // Where it should have gone nothing may be mapped any more, or soon something else.
        moving = false;
        munmap(source, piece);
        if (done > 0) munmap(block.memory, done);
        if (done + piece < size) munmap(block.memory + done + piece, size - done - piece);
      }
      source += piece;
    }
  }
  if (!moving) return map_block(size);
  if (done < size) block.pieces.push_back(size - done);
  return block;
}

class Blocks {
 public:
  static Blocks& get() {
    static Blocks* blocks = new Blocks;  // never destroyed: tensors may outlive every static object
    return *blocks;
  }

  void* take(size_t size) {
    Block block;
    std::vector<Block> spare;
    {
      const std::lock_guard lock(mutex_);
      usage_.in_use += size;
      usage_.most_in_use = std::max(usage_.most_in_use, usage_.in_use);
      for (size_t i = kept_.size(); i-- > 0 && block.memory == nullptr;) {  // the last one may still be in the cache
        if (kept_[i].size() == size) block = take_out(i);
      }
      if (block.memory == nullptr) spare = take_surplus();
    }
    if (block.memory == nullptr) block = map_block(size, spare);
    if (block.memory == nullptr && release() > 0) block = map_block(size);
    const std::lock_guard lock(mutex_);
    if (block.memory == nullptr) {
      usage_.in_use -= size;
      return nullptr;
    }
    char* const memory = block.memory;
    in_use_[memory] = std::move(block);
    return memory;
  }

  void give_back(void* memory, size_t size) {
    // The pages stay until the system needs them, so taking the block again costs nothing.
    (void)madvise(memory, size, MADV_FREE);
    const std::lock_guard lock(mutex_);
    kept_.push_back(std::move(in_use_.extract(memory).mapped()));
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
    size_t num_bytes = 0;
    for (const Block& block : blocks) {
      block.unmap();
      num_bytes += block.size();
    }
    return num_bytes;
  }

  BlockUsage usage() {
    const std::lock_guard lock(mutex_);
    return usage_;
  }

 private:
  // A child of fork must not inherit a lock that nobody in it will release.
  Blocks() {
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
  }

  Block take_out(size_t i) {
    Block block = std::move(kept_[i]);
    usage_.kept -= block.size();
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
    return block;
  }

  // What is kept beyond what was once in use, oldest first. It never is more than the block that is being taken.
  std::vector<Block> take_surplus() {
    std::vector<Block> blocks;
    while (!kept_.empty() && usage_.in_use + usage_.kept > usage_.most_in_use) {
      const size_t surplus = usage_.in_use + usage_.kept - usage_.most_in_use;
      if (kept_.front().size() <= surplus) {
        blocks.push_back(take_out(0));
      } else {
        usage_.kept -= surplus;
        blocks.push_back(kept_.front().split(surplus));
      }
    }
    return blocks;
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  std::unordered_map<void*, Block> in_use_;
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
