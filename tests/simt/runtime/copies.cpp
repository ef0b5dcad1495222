// cp.async, and single accesses to shared and global memory.
#include <algorithm>
#include <cstring>

#include "emulated.h"
#include "state.h"

namespace simt {
namespace {

constexpr uint32_t kChunk = 16;

// The write belongs to `agent` at `time`.
void copy(CopyAsync& work, uint32_t agent, uint32_t time) {
  if (work.done) return;
  work.done = true;
  unsigned char chunk[kChunk] = {};
  memcpy(chunk, work.src, work.src_bytes);
  memcpy(shared_pointer(work.dst, kChunk, kChunk, "cp.async"), chunk, kChunk);
  shadow().record(work.dst, kChunk, Access::kWrite, agent, time);
}

void finish(CopyBatch& batch, uint32_t agent) {
  for (CopyAsync& work : batch.copies) copy(work, agent, batch.time);
  batch.done = true;
}

void copy_some_early() {
  if (options.timing != Timing::kRandom) return;
  for (auto& group : self->copies.committed) {
    for (CopyAsync& work : group) {
      if (chance(4)) copy(work, self->agent, self->now());
    }
  }
}

}  // namespace

void cp_async(uint32_t dst, const void* src, uint32_t src_bytes) {
  shared_pointer(dst, kChunk, kChunk, "cp.async");
  if (reinterpret_cast<uintptr_t>(src) % kChunk != 0) fail("cp.async: global address %p is not a multiple of 16", src);
  if (src_bytes > kChunk) fail("cp.async: src-size %u is more than 16", src_bytes);
  if (src_bytes != 0) check_global(src, src_bytes, Access::kRead, "cp.async");
  check_shared_write(dst, kChunk, "cp.async");
  CopyAsync work{dst, src, src_bytes, false};
  if (options.timing == Timing::kEager) copy(work, self->agent, self->now());
  self->copies.open.push_back(work);
}

void cp_async_commit_group() {
  self->copies.commit();
  copy_some_early();
}

void cp_async_wait_group(size_t pending) {
  copy_some_early();
  self->copies.retire(pending, [](CopyAsync& work) { copy(work, self->agent, self->now()); });
  maybe_step_aside();
}

void cp_async_wait_all() {
  self->copies.commit();
  self->copies.retire(0, [](CopyAsync& work) { copy(work, self->agent, self->now()); });
  for (const auto& batch : self->batches) finish(*batch, self->agent);
  self->batches.clear();
  maybe_step_aside();
}

void cp_async_mbarrier_arrive_noinc(uint32_t mbarrier) {
  mbarrier_at(mbarrier, "cp.async.mbarrier.arrive");
  const auto batch = std::make_shared<CopyBatch>();
  batch->copies = std::move(self->copies.open);
  self->copies.open.clear();
  for (auto& group : self->copies.committed) {
    batch->copies.insert(batch->copies.begin(), group.begin(), group.end());
    group.clear();
  }
  auto& batches = self->batches;
  batches.erase(std::remove_if(batches.begin(), batches.end(), [](const auto& b) { return b->done; }), batches.end());
  batches.push_back(batch);
  const uint32_t agent = self->agent;
  batch->time = self->now();
  Clock known = self->clock;
  self->release();
  submit([mbarrier, agent, batch, known = std::move(known)] {
    finish(*batch, agent);
    MBarrier& target = mbarrier_at(mbarrier, "cp.async.mbarrier.arrive");
    target.arriving.join(known);
    mbarrier_count(target, 1, "cp.async.mbarrier.arrive");
  });
}

void check_copies_done(const Thread& thread) {
  for (const auto& group : thread.copies.committed) {
    for (const CopyAsync& work : group) {
      if (!work.done) fail("a thread exits with a cp.async that it never waited for");
    }
  }
  for (const CopyAsync& work : thread.copies.open) {
    if (!work.done) fail("a thread exits with a cp.async that it never committed");
  }
  for (const auto& batch : thread.batches) {
    if (!batch->done) fail("a thread exits with a cp.async under way, for which only an mbarrier waits");
  }
  if (!thread.bulk_stores.empty()) fail("a thread exits while its bulk stores may still read shared memory");
}

uint32_t smem_address(const void* pointer) {
  const uint32_t address = shared_address_of(pointer);
  if (address == kNowhere) fail("smem_address: %p does not point to shared memory", pointer);
  return address;
}

void read_shared(uint32_t address, void* to, uint32_t bytes) {
  const unsigned char* from = shared_pointer(address, bytes, bytes, "ld.shared");
  access_shared(address, bytes, Access::kRead, "ld.shared");
  memcpy(to, from, bytes);
}

void write_shared(uint32_t address, const void* from, uint32_t bytes) {
  unsigned char* to = shared_pointer(address, bytes, bytes, "st.shared");
  access_shared(address, bytes, Access::kWrite, "st.shared");
  memcpy(to, from, bytes);
}

void read_aligned(const void* pointer, void* to, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("ld: %p is not a multiple of %u", pointer, bytes);
  on_access(pointer, bytes, Access::kRead);
  memcpy(to, pointer, bytes);
}

void read_constant(const void* pointer, void* to, uint32_t bytes) {
  check_constant(pointer, bytes, "ld.global.nc");
  read_aligned(pointer, to, bytes);
}

void write_aligned(void* pointer, const void* from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("st: %p is not a multiple of %u", pointer, bytes);
  on_access(pointer, bytes, Access::kWrite);
  memcpy(pointer, from, bytes);
}

void before_atomic(const void* pointer, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("atomic: %p is not a multiple of %u", pointer, bytes);
  maybe_step_aside();
  on_access(pointer, bytes, Access::kAtomic);
}

void copy_bytes(void* to, const void* from, uint32_t bytes) {
  memcpy(to, from, bytes);
}

void spin() {
  poll_here({"__nanosleep", "", {}});
}

void trap(const char* what) {
  fail("trap: %s", what);
}

}  // namespace simt
