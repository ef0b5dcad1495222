// Global memory: the buffers a kernel may touch.
#include "global_memory.h"

#include <cstdint>
#include <vector>

#include "scheduler.h"
#include "state.h"

namespace simt {
namespace {

struct Buffer {
  std::string name;
  const char* begin;
  const char* end;
  bool writable;

  bool holds(const char* p, size_t bytes) const { return p >= begin && p + bytes <= end; }
};

constexpr ptrdiff_t kFarAway = 1 << 20;  // bytes; nobody misses a buffer by more

std::vector<Buffer> buffers;

const char* verb(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic update";
}

[[noreturn]] void report(const char* p, size_t bytes, Access access, const char* what) {
  const Buffer* nearest = nullptr;
  ptrdiff_t distance = 0;
  for (const Buffer& buffer : buffers) {
    const ptrdiff_t past = p < buffer.begin ? p - buffer.begin : p + bytes - buffer.end;
    const ptrdiff_t size = past < 0 ? -past : past;
    if (nearest == nullptr || size < distance) {
      nearest = &buffer;
      distance = size;
    }
  }
  if (nearest == nullptr || distance > kFarAway) {
    fail("out of bounds: %s: %s of %zu bytes at %p, in no known buffer", what, verb(access), bytes, p);
  }
  fail("out of bounds: %s: %s of %zu bytes at byte %td of buffer '%s', which has %td bytes", what, verb(access), bytes,
       p - nearest->begin, nearest->name.c_str(), nearest->end - nearest->begin);
}

}  // namespace

void add_buffer(const char* name, const void* data, size_t bytes, bool writable) {
  const auto* begin = static_cast<const char*>(data);
  buffers.push_back({name, begin, begin + bytes, writable});
}

void clear_buffers() {
  buffers.clear();
}

void check_global(const void* pointer, size_t bytes, Access access, const char* what) {
  const auto* p = static_cast<const char*>(pointer);
  const Buffer* held = nullptr;
  for (const Buffer& buffer : buffers) {
    if (!buffer.holds(p, bytes)) continue;
    held = &buffer;
    if (access == Access::kRead || buffer.writable) return;
  }
  if (held != nullptr) fail("%s: %s to buffer '%s', which is an input", what, verb(access), held->name.c_str());
  if (in_closure(p, bytes) || in_kernel_library(p)) return;
  report(p, bytes, access, what);
}

void on_access(const void* pointer, size_t bytes, Access access) {
  if (self == nullptr) return;  // host code
  const auto* p = static_cast<const char*>(pointer);
  if (p >= self->stack && p < self->stack + StackPool::kStackBytes) return;  // the thread's own variables
  const uint32_t address = shared_address_of(p);
  if (address == kNowhere) {
    check_global(p, bytes, access, "the thread");
  } else {
    shared_pointer(address, static_cast<uint32_t>(bytes), 1, "an access");
    access_shared(address, static_cast<uint32_t>(bytes), access, "the thread");
  }
}

}  // namespace simt
