// Memory for large arrays on the CPU. Torch-free; Linux only: elsewhere nothing is kept and there are no huge pages.
//
// The C library returns a large block to the system when it is freed and gets the next one from there, to be cleared
// page by page when it is first touched. A kernel that writes its output once can wait longer for that than it
// computes. Blocks of this file lie in huge pages where the system has them, and are used again.
#pragma once

#include <cstddef>

#pragma GCC visibility push(default)

namespace moekernels {

constexpr size_t kHugePage = size_t{2} << 20;  // bytes

// At least num_bytes, uninitialised, aligned to a huge page. Null for less than a huge page (the C library keeps such
// blocks itself), when the system has no more, and with MOEKERNELS_KEEP_MEMORY=off in the environment.
void* take_block(size_t num_bytes);

// Gives back what take_block(num_bytes) returned. It is kept for the next one of about that size. Blocks in use and
// kept together never exceed what was once asked for at a time: a block of another size is made of the pages of kept
// ones. The system may take those when it runs short.
void give_back_block(void* block, size_t num_bytes);

// Returns all kept blocks to the system; the result is their bytes.
size_t release_kept_blocks();

struct BlockUsage {
  size_t in_use, kept;  // bytes
  size_t most_in_use;   // since the last release_kept_blocks
};
BlockUsage block_usage();

}  // namespace moekernels

#pragma GCC visibility pop
