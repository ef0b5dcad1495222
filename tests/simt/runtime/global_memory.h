// Which global memory kernels may touch.
#pragma once

#include <cstddef>

namespace simt {

void add_buffer(const char* name, const void* data, size_t bytes, bool writable);
void clear_buffers();
void forget_writes();

}  // namespace simt
