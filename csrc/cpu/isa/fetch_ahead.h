// What will be read next, fetched from memory into the first-level cache. Processors' own prefetchers lose track where
// rows are short, as those of codes are.
#pragma once

#include "cpu/isa/simd.h"

namespace moekernels::cpu {
namespace {

MOEKERNELS_INLINE void fetch_ahead(const void* memory, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(memory) + i, 0, 3);
}

}  // namespace
}  // namespace moekernels::cpu
