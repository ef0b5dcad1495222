// mbarriers: arrivals and bytes that end a phase, and who may rely on what once it has ended.
#include "emulated.h"
#include "state.h"

namespace simt {
namespace {

constexpr uint32_t kBytes = 8;
constexpr uint32_t kMaxCount = (1u << 20) - 1;

void settle(MBarrier& mbarrier) {
  if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.expected;
  mbarrier.complete = mbarrier.arriving;
  for (Thread* thread : mbarrier.waiting) wake(thread);
  mbarrier.waiting.clear();
  ++progress;
}

bool ended(const MBarrier& mbarrier, uint32_t parity) {
  return (mbarrier.phase & 1) != parity;
}

void expect(MBarrier& mbarrier, uint32_t bytes) {
  mbarrier.bytes += bytes;
  if (mbarrier.bytes > kMaxCount) {
    fail("mbarrier: %lld pending bytes are more than 2^20 - 1", static_cast<long long>(mbarrier.bytes));
  }
}

void arrive(MBarrier& mbarrier, const char* what) {
  mbarrier.arriving.join(self->clock);
  self->release();
  mbarrier_count(mbarrier, 1, what);
}

Block* block_at(uint32_t cluster_address, const char* what) {
  const uint32_t rank = (cluster_address >> 24) - 1;
  if (rank >= cluster->blocks.size()) fail("%s: 0x%x is no address that mapa made", what, cluster_address);
  return cluster->blocks[rank];
}

}  // namespace

uint32_t mapa(uint32_t address, uint32_t rank) {
  if (rank >= cluster->blocks.size()) fail("mapa: rank %u in a cluster of %zu", rank, cluster->blocks.size());
  return (rank + 1) << 24 | address;
}

bool overlaps_mbarrier(uint32_t address, uint32_t bytes) {
  if (address >= block->mbarriers_end || address + bytes <= block->mbarriers_begin) return false;
  const auto next = block->mbarriers.lower_bound(address + bytes);
  return next != block->mbarriers.begin() && std::prev(next)->first + kBytes > address;
}

MBarrier& mbarrier_at(uint32_t address, const char* what) {
  const auto found = block->mbarriers.find(address);
  if (found == block->mbarriers.end()) {
    fail("%s: no mbarrier has been initialised at shared address 0x%x", what, address);
  }
  MBarrier& mbarrier = found->second;
  if (self != nullptr && !self->clock.sees(mbarrier.owner, mbarrier.born)) {
    fail("%s: mbarrier 0x%x is used with no barrier after its initialisation by %s", what, address,
         describe_agent(mbarrier.owner).c_str());
  }
  return mbarrier;
}

void mbarrier_count(MBarrier& mbarrier, uint32_t arrivals, const char* what) {
  if (mbarrier.pending < arrivals) {
    fail("%s: more arrivals in one phase than the %u the mbarrier was initialised for", what, mbarrier.expected);
  }
  mbarrier.pending -= arrivals;
  settle(mbarrier);
}

void mbarrier_complete_bytes(MBarrier& mbarrier, int64_t bytes) {
  mbarrier.bytes -= bytes;
  settle(mbarrier);
}

void mbarrier_init(uint32_t address, uint32_t arrivals) {
  shared_pointer(address, kBytes, kBytes, "mbarrier.init");
  if (arrivals == 0 || arrivals > kMaxCount) fail("mbarrier.init: count %u is not in 1 .. 2^20 - 1", arrivals);
  access_shared(address, kBytes, Access::kWrite, "mbarrier.init");  // fails where an mbarrier lives
  MBarrier& mbarrier = block->mbarriers[address];
  mbarrier.expected = mbarrier.pending = arrivals;
  mbarrier.owner = self->agent;
  mbarrier.born = self->now();
  mbarrier.arriving.reset(block->num_agents(), 0);
  mbarrier.complete.reset(block->num_agents(), 0);
  block->mbarriers_begin = std::min(block->mbarriers_begin, address);
  block->mbarriers_end = std::max(block->mbarriers_end, address + kBytes);
}

void fence_mbarrier_init() {
  for (auto& entry : block->mbarriers) {
    if (entry.second.owner == self->agent) entry.second.fenced = true;
  }
}

void mbarrier_inval(uint32_t address) {
  const MBarrier& mbarrier = mbarrier_at(address, "mbarrier.inval");
  if (mbarrier.bytes != 0) fail("mbarrier.inval: mbarrier 0x%x still expects bytes", address);
  block->mbarriers.erase(address);
}

void mbarrier_expect_tx(uint32_t address, uint32_t bytes) {
  expect(mbarrier_at(address, "mbarrier.expect_tx"), bytes);
}

void mbarrier_arrive(uint32_t address) {
  arrive(mbarrier_at(address, "mbarrier.arrive"), "mbarrier.arrive");
  maybe_step_aside();
}

void mbarrier_arrive_cluster(uint32_t cluster_address) {
  constexpr const char* kWhat = "mbarrier.arrive.shared::cluster";
  {
    const InBlock there(block_at(cluster_address, kWhat));
    check_block_lives();
    arrive(mbarrier_at(cluster_address & kClusterOffset, kWhat), kWhat);
  }
  maybe_step_aside();
}

void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  MBarrier& mbarrier = mbarrier_at(address, "mbarrier.arrive.expect_tx");
  expect(mbarrier, bytes);
  arrive(mbarrier, "mbarrier.arrive.expect_tx");
  maybe_step_aside();
}

bool mbarrier_try_wait_parity(uint32_t address, uint32_t parity) {
  MBarrier& mbarrier = mbarrier_at(address, "mbarrier.try_wait");
  if (!ended(mbarrier, parity)) poll_here({"mbarrier.try_wait", " of 0x%llx for parity %llu", {address, parity}});
  if (!ended(mbarrier, parity)) return false;
  self->clock.join(mbarrier.complete);
  return true;
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  MBarrier& mbarrier = mbarrier_at(address, "mbarrier.try_wait");
  if (parity > 1) fail("mbarrier.try_wait: parity %u is neither 0 nor 1", parity);
  // The thread waits for one phase; should a whole further one pass meanwhile, it still has seen the one it waited for.
  if (!ended(mbarrier, parity)) {
    mbarrier.waiting.push_back(self);
    wait_here({"mbarrier_wait", " of 0x%llx for parity %llu", {address, parity}});
  }
  self->clock.join(mbarrier.complete);
  maybe_step_aside();
}

std::string describe_mbarriers() {
  std::string text;
  for (const auto& [address, mbarrier] : block->mbarriers) {
    if (mbarrier.waiting.empty()) continue;
    char line[160];
    snprintf(line, sizeof line, "\n    mbarrier 0x%x, phase %u: %u of %u arrivals and %lld bytes are missing", address,
             mbarrier.phase, mbarrier.pending, mbarrier.expected, static_cast<long long>(mbarrier.bytes));
    text += line;
  }
  return text;
}

void check_mbarriers_done() {
  for (const auto& [address, mbarrier] : block->mbarriers) {
    if (mbarrier.bytes != 0) {
      fail("the block ends while mbarrier 0x%x has %lld expected bytes that never came", address,
           static_cast<long long>(mbarrier.bytes));
    }
  }
}

}  // namespace simt
