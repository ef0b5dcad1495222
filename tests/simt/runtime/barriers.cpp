// Barriers of a block: __syncthreads and its relatives, named barriers, and the registers that setmaxnreg moves.
#include <algorithm>

#include "emulated.h"
#include "state.h"

namespace simt {
namespace {

constexpr unsigned kAllThreads = 0;  // as `expected`: all that have not exited

bool full(const Barrier& barrier) {
  if (barrier.arrived == 0) return false;
  return barrier.arrived == (barrier.expected == kAllThreads ? block->live : barrier.expected);
}

void open(Barrier& barrier, const Thread* caller) {
  for (Thread* thread : barrier.waiting) {
    thread->clock.join(barrier.clock);
    thread->release();
    thread->barrier_result[0] = barrier.count;
    thread->barrier_result[1] = barrier.count == barrier.arrived;
    thread->barrier_result[2] = barrier.count != 0;
    if (thread != caller) wake(thread);
  }
  barrier = Barrier{};
  ++progress;
}

void arrive(unsigned id, unsigned expected, bool predicate) {
  Barrier& barrier = block->barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.clock.reset(block->num_agents(), 0);
  } else if (barrier.expected != expected) {
    fail("named barrier %u is used for %u threads and for %u at once", id, barrier.expected, expected);
  }
  barrier.clock.join(self->clock);
  barrier.count += predicate ? 1 : 0;
  ++barrier.arrived;
}

void arrive_and_wait(unsigned id, unsigned expected, bool predicate) {
  arrive(id, expected, predicate);
  Barrier& barrier = block->barriers[id];
  barrier.waiting.push_back(self);
  if (full(barrier)) {
    open(barrier, self);
    maybe_step_aside();
  } else {
    if (expected == kAllThreads) {
      wait_here({"__syncthreads", "", {}});
    } else {
      wait_here({"bar.sync", " %llu for %llu threads", {id, expected}});
    }
  }
}

void check_named(unsigned id, unsigned num_threads, const char* what) {
  if (id == 0 || id >= kNamedBarriers) fail("%s: barrier %u; named barriers are 1 .. 15", what, id);
  if (num_threads == 0 || num_threads % kWarpSize != 0 || num_threads > kMaxThreads) {
    fail("%s: %u threads is not a number of whole warps", what, num_threads);
  }
}

void check_registers(unsigned registers, const char* what) {
  if (registers < 24 || registers > 256 || registers % 8 != 0) {
    fail("%s: %u is not a multiple of 8 from 24 to 256", what, registers);
  }
  if (block->num_threads % 128 != 0) {
    fail("%s needs whole warpgroups, the block has %u threads", what, block->num_threads);
  }
}

}  // namespace

namespace {

void open_cluster_barrier_if_full() {
  if (cluster->arrived == 0 || cluster->arrived != cluster->live) return;
  cluster->complete = cluster->arriving;
  cluster->arrived = 0;
  ++cluster->phase;
  ++progress;
  for (Thread* thread : cluster->waiting) wake(thread);
  cluster->waiting.clear();
}

}  // namespace

// Threads that have exited are not waited for.
void finish_cluster_barrier_after_exit(const Thread& thread) {
  if (thread.at_cluster_barrier && thread.cluster_phase == cluster->phase) --cluster->arrived;
  open_cluster_barrier_if_full();
}

void cluster_arrive() {
  if (self->at_cluster_barrier) fail("barrier.cluster.arrive: the thread has arrived already and not waited since");
  if (cluster->arrived == 0) cluster->arriving.reset(block->num_agents(), 0);
  cluster->arriving.join(self->clock);
  self->release();
  self->at_cluster_barrier = true;
  self->cluster_phase = cluster->phase;
  ++cluster->arrived;
  open_cluster_barrier_if_full();
  maybe_step_aside();
}

void cluster_wait() {
  if (!self->at_cluster_barrier) fail("barrier.cluster.wait: the thread has not arrived");
  if (cluster->phase == self->cluster_phase) {
    cluster->waiting.push_back(self);
    wait_here({"barrier.cluster.wait", "", {}});
  }
  self->clock.join(cluster->complete);
  self->at_cluster_barrier = false;
}

uint32_t cluster_ctarank() {
  return block->rank;
}

void finish_barriers_after_exit() {
  for (Barrier& barrier : block->barriers) {
    if (barrier.expected == kAllThreads && full(barrier)) open(barrier, nullptr);
  }
}

uint64_t syncthreads(bool predicate, int result) {
  arrive_and_wait(0, kAllThreads, predicate);
  return self->barrier_result[result];
}

void bar_sync(uint32_t id, uint32_t num_threads) {
  check_named(id, num_threads, "bar.sync");
  arrive_and_wait(id, num_threads, false);
}

void bar_arrive(uint32_t id, uint32_t num_threads) {
  check_named(id, num_threads, "bar.arrive");
  arrive(id, num_threads, false);
  self->release();
  if (full(block->barriers[id])) open(block->barriers[id], nullptr);
  maybe_step_aside();
}

void setmaxnreg(unsigned registers, bool increase) {
  const char* what = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  check_registers(registers, what);
  Warp& warp = *self->warp;
  // One lane acts for the warp, after all have come.
  meet(what, 0xFFFFFFFF, nullptr, [](Warp&, Thread* const[], void* const[], uint32_t) {});
  if (self->lane == 0) {
    if (increase ? registers < warp.registers : registers > warp.registers) {
      fail("%s to %u, but the warp has %u registers per thread", what, registers, warp.registers);
    }
    if (increase) {
      while ((registers - warp.registers) * kWarpSize > block->free_registers) {
        block->register_queue.push_back(self);
        wait_here({"setmaxnreg.inc", " to %llu: registers that nobody gives back", {registers}});
      }
      block->free_registers -= (registers - warp.registers) * kWarpSize;
    } else {
      block->free_registers += (warp.registers - registers) * kWarpSize;
      for (Thread* thread : block->register_queue) wake(thread);
      block->register_queue.clear();
    }
    warp.registers = registers;
  }
  meet(what, 0xFFFFFFFF, nullptr, [](Warp&, Thread* const[], void* const[], uint32_t) {});
}

}  // namespace simt
