// Global memory: the buffers a kernel may touch.
#include "global_memory.h"

#include <cstdint>
#include <unordered_set>
#include <utility>
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

constexpr uintptr_t kGranule = 16;

std::vector<Buffer> buffers;  // in any order: what is touched often moves towards the front, where it is found soon
constexpr size_t kNear = 8;
std::unordered_set<uintptr_t> written;  // granules that launches wrote which may still run: see forget_writes

template <class Do>
void for_each_granule(const void* pointer, size_t bytes, Do&& act) {
  const auto first = reinterpret_cast<uintptr_t>(pointer);
  for (uintptr_t granule = first / kGranule; granule <= (first + bytes - 1) / kGranule; ++granule) act(granule);
}

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

// Every launch before has ended: what it wrote is constant now.
void forget_writes() {
  written.clear();
}

void check_waited(const char* what) {
  if (self == nullptr || self->waited || !is_overlapped()) return;
  fail("%s touches global memory before griddepcontrol.wait, while the kernel before may still run", what);
}

void check_constant(const void* pointer, size_t bytes, const char* what) {
  for_each_granule(pointer, bytes, [&](uintptr_t granule) {
    if (written.count(granule) == 0) return;
    fail("%s at %p: a launch that may still run wrote there, and the read-only path may show what was there before",
         what, pointer);
  });
}

void check_global(const void* pointer, size_t bytes, Access access, const char* what) {
  const auto* p = static_cast<const char*>(pointer);
  const Buffer* held = nullptr;
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (!buffers[i].holds(p, bytes)) continue;
    held = &buffers[i];
    check_waited(what);
    if (access != Access::kRead && !held->writable) continue;
    if (access != Access::kRead) for_each_granule(p, bytes, [](uintptr_t granule) { written.insert(granule); });
    if (i > kNear) std::swap(buffers[i], buffers[i / 2]);
    return;
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
