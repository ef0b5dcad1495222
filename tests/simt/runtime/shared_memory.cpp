// Shared memory: where it lies, its 32-bit addresses, and the checks of every access.
//
// Dynamic shared memory ends at an inaccessible page. Static __shared__ variables are thread_local variables of the
// kernel's library, so that all of them lie in one range, which can be poisoned before each block.
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "launch_emulated.h"
#include "state.h"

namespace simt {
namespace {

constexpr uint32_t kStaticAddress = 1024;  // no shared variable has the address 0
constexpr uint32_t kAlignment = 1024;
constexpr uint32_t kArenaBytes = 256 * 1024;
constexpr int kPoison = 0xFF;  // NaN in every floating-point type, -1 in the integers

struct Range {
  unsigned char* data = nullptr;
  uint32_t bytes = 0;
  uint32_t address = 0;

  bool holds(const void* pointer) const { return pointer >= data && pointer < data + bytes; }
};

Range fixed;  // static __shared__
// By the block's rank in its cluster.
Range dynamics[kMaxCluster];  // dynamic shared memory
unsigned char* arenas[kMaxCluster] = {};
Shadow shadows[kMaxCluster];

const Range& dynamic_range() {
  return dynamics[block->rank];
}

unsigned char* arena_end(unsigned rank) {
  unsigned char*& arena = arenas[rank];
  if (arena == nullptr) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kArenaBytes + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    arena = static_cast<unsigned char*>(memory) + page;
    if (mprotect(memory, page, PROT_NONE) != 0 || mprotect(arena + kArenaBytes, page, PROT_NONE) != 0) abort();
  }
  return arena + kArenaBytes;
}

// The thread_local block that holds `anchor`.
Range find_static(const void* anchor) {
  struct Search {
    const unsigned char* anchor;
    Range found;
  } search{static_cast<const unsigned char*>(anchor), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto* search = static_cast<Search*>(data);
        auto* block = static_cast<unsigned char*>(info->dlpi_tls_data);
        for (int i = 0; block != nullptr && i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_TLS) continue;
          const Range range{block, static_cast<uint32_t>(header.p_memsz), kStaticAddress};
          if (range.holds(search->anchor)) search->found = range;
        }
        return 0;
      },
      &search);
  return search.found;
}

void report(const Shadow::Conflict& conflict, Access access, const char* what) {
  const char* verb = access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "atomically updates";
  const char* earlier = conflict.earlier == Access::kRead    ? "read"
                        : conflict.earlier == Access::kWrite ? "wrote"
                                                             : "atomically updated";
  fail("shared memory race: %s %s shared address 0x%x, which %s %s with no barrier in between", what, verb,
       conflict.address, describe_agent(conflict.agent).c_str(), earlier);
}

}  // namespace

Shadow& shadow() {
  return shadows[block->rank];
}

void map_shared(const void* module_anchor, size_t dynamic_bytes, unsigned cluster_size) {
  fixed = find_static(module_anchor);
  for (unsigned rank = 0; rank < cluster_size; ++rank) {
    Range& dynamic = dynamics[rank];
    const uint32_t offset = options.smem_offset;
    dynamic.bytes = static_cast<uint32_t>(dynamic_bytes);
    dynamic.address = (kStaticAddress + fixed.bytes + kAlignment - 1) / kAlignment * kAlignment + offset;
    dynamic.data = arena_end(rank) - (offset + dynamic.bytes + kAlignment - 1) / kAlignment * kAlignment + offset;
    shadows[rank].resize(dynamic.address + dynamic.bytes);
  }
}

void poison_shared() {
  memset(fixed.data, kPoison, fixed.bytes);
  memset(dynamic_range().data, kPoison, dynamic_range().bytes);
}

unsigned char* dynamic_smem() {
  return dynamic_range().data;
}

uint32_t shared_address_of(const void* pointer) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  const Range& dynamic = dynamic_range();
  if (dynamic.holds(p)) return dynamic.address + static_cast<uint32_t>(p - dynamic.data);
  if (fixed.holds(p)) {
    if (cluster->blocks.size() > 1) fail("static shared memory is not modelled in a cluster");
    return fixed.address + static_cast<uint32_t>(p - fixed.data);
  }
  const unsigned char* const arena = arenas[block->rank];
  if (arena != nullptr && p >= arena && p <= arena + kArenaBytes) {
    fail("shared memory overrun: an access %td bytes from the start of the %u bytes of dynamic shared memory",
         p - dynamic.data, dynamic.bytes);
  }
  return kNowhere;
}

unsigned char* shared_pointer(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address % alignment != 0) fail("%s: shared address 0x%x is not a multiple of %u", what, address, alignment);
  const Range& dynamic = dynamic_range();
  for (const Range* range : {&dynamic, const_cast<const Range*>(&fixed)}) {
    if (address >= range->address && address + bytes <= range->address + range->bytes) {
      return range->data + (address - range->address);
    }
  }
  fail("shared memory overrun: %s of %u bytes at shared address 0x%x; dynamic shared memory is 0x%x .. 0x%x", what,
       bytes, address, dynamic.address, dynamic.address + dynamic.bytes);
}

void access_shared(uint32_t address, uint32_t bytes, Access access, const char* what) {
  if (overlaps_mbarrier(address, bytes)) fail("%s touches the mbarrier at shared address 0x%x", what, address);
  if (!options.check_races) return;
  const auto conflict = shadow().check(address, bytes, access, self->agent, self->clock);
  if (conflict.found) report(conflict, access, what);
  shadow().record(address, bytes, access, self->agent, self->now());
}

void check_shared_write(uint32_t address, uint32_t bytes, const char* what) {
  if (overlaps_mbarrier(address, bytes)) fail("%s touches the mbarrier at shared address 0x%x", what, address);
  if (!options.check_races) return;
  const auto conflict = shadow().check(address, bytes, Access::kWrite, self->agent, self->clock);
  if (conflict.found) report(conflict, Access::kWrite, what);
}

void check_async_read(uint32_t address, uint32_t bytes, const Clock& clock, const char* what) {
  if (!options.check_races) return;
  const auto conflict = shadow().check_async_read(address, bytes, block->engine_agent(), clock);
  if (conflict.found && conflict.unfenced) {
    fail("missing proxy fence: %s reads shared address 0x%x, which %s wrote with no fence.proxy.async in between", what,
         conflict.address, describe_agent(conflict.agent).c_str());
  }
  if (conflict.found) report(conflict, Access::kRead, what);
}

}  // namespace simt
