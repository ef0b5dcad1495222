// Runs the blocks of a launch: fibers, their order, deadlock and failure.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>

#include "emulated.h"
#include "global_memory.h"
#include "launch_emulated.h"
#include "state.h"

namespace simt {

Options options;
Cluster* cluster = nullptr;
Block* block = nullptr;
Thread* self = nullptr;
uint64_t progress = 0;
const void* fault_location = nullptr;
std::string last_error;
std::string launch_log;
std::string running_kernel;

namespace {

struct LaunchFailed {};

StackPool stacks;
Fiber scheduler;
const KernelCall* call = nullptr;
uint64_t random_state = 1;
uint32_t newest_time = 0;    // of any clock in any block so far
bool interrogating = false;  // waiting threads are asked where they are
std::string interrogated;

std::string format_list(const char* format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

std::string format_text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string format_text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_list(format, arguments);
  va_end(arguments);
  return text;
}

std::string describe_address(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return format_text("%p", address);
  return format_text("%s+0x%zx", info.dli_fname,
                     static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase)));
}

void record_error(const std::string& what) {
  if (!last_error.empty()) return;
  last_error = format_text("%s\n  kernel %s, grid (%u, %u, %u), block shape (%u, %u, %u), seed %llu", what.c_str(),
                           running_kernel.c_str(), call->grid.x, call->grid.y, call->grid.z, call->block.x,
                           call->block.y, call->block.z, static_cast<unsigned long long>(options.seed));
  if (block != nullptr) {
    last_error += format_text("\n  in block (%u, %u, %u)", block->index.x, block->index.y, block->index.z);
  }
  if (self != nullptr) {
    last_error += format_text(", thread (%u, %u, %u) = warp %u lane %u", self->index.x, self->index.y, self->index.z,
                              self->warp->index, self->lane);
    const std::string site = fault_location != nullptr ? describe_address(fault_location) : describe_call_site();
    if (!site.empty()) last_error += "\n  at " + site;
  }
}

void thread_main() {
  call->invoke(call->closure);
  if (call->overlapped && !self->waited) {
    fail("a thread exits without griddepcontrol.wait: the kernel after it would not wait for the one before it either");
  }
  Warp& warp = *self->warp;
  check_copies_done(*self);
  self->state = Thread::State::kExited;
  warp.live &= ~(1u << self->lane);
  --block->live;
  --cluster->live;
  ++progress;
  if (warp.live == 0) check_matrix_done(warp);
  finish_meetings_after_exit(warp);
  finish_barriers_after_exit();
  finish_cluster_barrier_after_exit(*self);
  resume_scheduler();
}

// Asks one waiting thread where in the kernel it stands.
std::string interrogate(Thread& thread) {
  interrogating = true;
  self = &thread;
  block = thread.block;
  Fiber::switch_between(scheduler, thread.fiber);
  self = nullptr;
  interrogating = false;
  return interrogated;
}

void report_deadlock() {
  struct Group {
    unsigned count = 0;
    Thread* first = nullptr;
  };
  std::map<std::string, Group> groups;
  for (Block* each : cluster->blocks) {
    for (Thread& thread : each->threads) {
      Group& group = groups[describe(thread)];
      if (group.count++ == 0) group.first = &thread;
    }
  }
  std::string text = "deadlock: no thread of the block can go on";
  for (const auto& [what, group] : groups) {
    text += format_text("\n    %u %s (the first: warp %u lane %u", group.count, what.c_str(), group.first->warp->index,
                        group.first->lane);
    if (group.first->state != Thread::State::kExited) text += ", at " + interrogate(*group.first);
    text += ")";
  }
  for (Block* each : cluster->blocks) {
    const InBlock there(each);
    text += describe_mbarriers();
  }
  record_error(text);
  throw LaunchFailed{};
}

void run_engine_once() {
  const size_t i = random_below(cluster->engine.size());
  const auto work = std::move(cluster->engine[i]);
  cluster->engine.erase(cluster->engine.begin() + static_cast<std::ptrdiff_t>(i));
  ++progress;
  work();
}

Thread* next_thread() {
  auto& ready = cluster->ready;
  const size_t i = options.seed == 0 ? 0 : random_below(ready.size());
  Thread* thread = ready[i];
  if (options.seed == 0) {
    ready.erase(ready.begin());
  } else {
    ready[i] = ready.back();
    ready.pop_back();
  }
  return thread;
}

void run_threads() {
  constexpr int kPatience = 64;  // rounds in which polling threads may find nothing new
  int idle_rounds = 0;
  uint64_t known_progress = progress;
  while (cluster->live > 0) {
    if (!cluster->engine.empty() && options.timing == Timing::kRandom && chance(8)) run_engine_once();
    if (cluster->ready.empty() && !cluster->polling.empty()) {
      idle_rounds = progress == known_progress ? idle_rounds + 1 : 0;
      known_progress = progress;
      if (idle_rounds < kPatience) {
        for (Thread* thread : cluster->polling) thread->state = Thread::State::kReady;
        cluster->ready.swap(cluster->polling);
      }
    }
    if (cluster->ready.empty()) {
      if (cluster->engine.empty()) report_deadlock();
      run_engine_once();
      idle_rounds = 0;
      continue;
    }
    Thread* thread = next_thread();
    self = thread;
    block = thread->block;
    Fiber::switch_between(scheduler, thread->fiber);
    self = nullptr;
    if (!last_error.empty()) throw LaunchFailed{};
  }
  if (!cluster->engine.empty()) fail("the block ends while asynchronous copies into its shared memory are in flight");
}

// The registers per thread a launch gets when every register of the multiprocessor goes to this one block.
unsigned registers_at_launch(unsigned num_threads) {
  constexpr unsigned kRegistersPerMultiprocessor = 65536;
  const unsigned warps = (num_threads + kWarpSize - 1) / kWarpSize;
  const unsigned most = kRegistersPerMultiprocessor / (warps * kWarpSize) / 8 * 8;
  return most < 256 ? most : 256;
}

void set_up_threads() {
  const unsigned n = block->num_threads;
  block->live = n;
  cluster->live += n;
  block->threads.resize(n);
  block->warps.resize((n + kWarpSize - 1) / kWarpSize);
  block->multiply_log.resize((block->warps.size() + 3) / 4);
  const uint32_t start = newest_time;
  for (unsigned i = 0; i < block->warps.size(); ++i) {
    block->warps[i].index = i;
    block->warps[i].registers = registers_at_launch(n);
    block->warps[i].matrix.time = start;
  }
  block->engine_time = start;
  shadow().start_block(start);
  for (unsigned i = 0; i < n; ++i) {
    Thread& thread = block->threads[i];
    thread.linear = i;
    thread.block = block;
    thread.agent = block->first_agent() + i;
    thread.index = {i % block->shape.x, i / block->shape.x % block->shape.y, i / (block->shape.x * block->shape.y)};
    thread.warp = &block->warps[i / kWarpSize];
    thread.lane = i % kWarpSize;
    thread.warp->live |= 1u << thread.lane;
    thread.clock.reset(block->num_agents(), start);
    thread.release();
    thread.stack = stacks.stack(block->rank * n + i);
    thread.fiber.prepare(stacks.stack(block->rank * n + i), StackPool::kStackBytes, thread_main);
    cluster->ready.push_back(&thread);
  }
}

uint32_t latest_time() {
  uint32_t latest = newest_time;
  for (Block* each : cluster->blocks) {
    latest = std::max(latest, each->engine_time);
    for (Thread& thread : each->threads) latest = std::max(latest, thread.now());
    for (const Warp& warp : each->warps) latest = std::max(latest, warp.matrix.time);
  }
  return latest;
}

// The blocks from `first` on, in the order of their numbers.
void run_cluster(uint64_t first) {
  std::vector<Block> blocks(call->cluster_size);
  Cluster state;
  cluster = &state;
  struct Leave {
    ~Leave() {
      newest_time = latest_time();
      self = nullptr;
      block = nullptr;
      cluster = nullptr;
    }
  } leave;
  for (Block& each : blocks) state.blocks.push_back(&each);
  for (unsigned rank = 0; rank < blocks.size(); ++rank) {
    const uint64_t linear = first + rank;
    block = &blocks[rank];
    block->rank = rank;
    block->grid = call->grid;
    block->shape = call->block;
    block->num_threads = call->block.x * call->block.y * call->block.z;
    block->index = {static_cast<unsigned>(linear % call->grid.x),
                    static_cast<unsigned>(linear / call->grid.x % call->grid.y),
                    static_cast<unsigned>(linear / (uint64_t{call->grid.x} * call->grid.y))};
    poison_shared();
    set_up_threads();
  }
  run_threads();
  for (Block& each : blocks) {
    block = &each;
    check_mbarriers_done();
  }
}

// The kernel in the name that the compiler gives an instance of moekernels::launch<kKernel, Args...>.
std::string kernel_name(const std::string& launcher) {
  const std::string before = "kKernel = ";
  const size_t begin = launcher.find(before);
  const size_t end = launcher.find("; Args");
  if (begin == std::string::npos || end == std::string::npos) return launcher;
  std::string name = launcher.substr(begin + before.size(), end - begin - before.size());
  for (const std::string scope : {"{anonymous}::", "moekernels::"}) {
    for (size_t at = name.find(scope); at != std::string::npos; at = name.find(scope)) name.erase(at, scope.size());
  }
  return name;
}

cudaError_t check_configuration() {
  const uint64_t threads = uint64_t{call->block.x} * call->block.y * call->block.z;
  if (threads == 0 || threads > kMaxThreads || call->block.z > 64) return cudaErrorInvalidConfiguration;
  const unsigned cluster_size = call->cluster_size;
  if (cluster_size == 0 || cluster_size > kMaxCluster || call->grid.x % cluster_size != 0) return cudaErrorInvalidValue;
  if (cluster_size > 1 && current_device().compute_capability < 90) return cudaErrorInvalidValue;
  if (call->grid.y > 65535 || call->grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (call->smem_bytes > static_cast<size_t>(current_device().max_smem_bytes())) return cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace

uint64_t random_below(uint64_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % n;
}

bool chance(unsigned one_in) {
  return options.seed != 0 && random_below(one_in) == 0;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record_error(format_list(format, arguments));
  va_end(arguments);
  if (self == nullptr) throw LaunchFailed{};
  for (;;) resume_scheduler();
}

void resume_scheduler() {
  Fiber::switch_between(self->fiber, scheduler);
}

bool in_kernel_library(const void* pointer) {
  Dl_info kernel;
  Dl_info other;
  return dladdr(reinterpret_cast<const void*>(call->invoke), &kernel) != 0 && dladdr(pointer, &other) != 0 &&
         kernel.dli_fbase == other.dli_fbase;
}

std::string describe_call_site() {
  void* frames[32];
  const int count = backtrace(frames, 32);
  for (int i = 0; i < count; ++i) {
    const void* site = static_cast<const char*>(frames[i]) - 1;  // a return address points behind the call
    if (in_kernel_library(site)) return describe_address(site);
  }
  return "";
}

std::string describe(const Thread& thread) {
  switch (thread.state) {
    case Thread::State::kExited:
      return "have exited";
    case Thread::State::kReady:
      return "could run";
    default: {
      char text[256];
      const Wait& wait = thread.wait;
      snprintf(text, sizeof text, wait.format, wait.numbers[0], wait.numbers[1], wait.numbers[2]);
      return std::string("wait at ") + wait.place + text;
    }
  }
}

std::string describe_agent(uint32_t agent) {
  const Block& home = *cluster->blocks[agent / block->agents_per_block()];
  const std::string where = cluster->blocks.size() > 1 ? format_text(" of block %u of the cluster", home.rank) : "";
  if (agent < home.engine_agent()) {
    const uint3 i = home.threads[agent - home.first_agent()].index;
    return format_text("thread (%u, %u, %u)", i.x, i.y, i.z) + where;
  }
  if (agent == home.engine_agent()) return "a TMA or bulk copy" + where;
  return format_text("a wgmma of warp %u", agent - home.engine_agent() - 1) + where;
}

void wait_here(const Wait& wait) {
  self->wait = wait;
  self->state = Thread::State::kWaiting;
  resume_scheduler();
  while (interrogating) {
    interrogated = describe_call_site();
    resume_scheduler();
  }
}

void poll_here(const Wait& wait) {
  self->wait = wait;
  self->state = Thread::State::kPolling;
  cluster->polling.push_back(self);
  resume_scheduler();
  while (interrogating) {
    interrogated = describe_call_site();
    resume_scheduler();
  }
}

void maybe_step_aside() {
  if (!chance(4)) return;
  cluster->ready.push_back(self);
  resume_scheduler();
}

void wake(Thread* thread) {
  thread->state = Thread::State::kReady;
  cluster->ready.push_back(thread);
  ++progress;
}

void submit(std::function<void()> work) {
  if (options.timing == Timing::kEager) {
    work();
  } else {
    cluster->engine.push_back([home = block, work = std::move(work)] {
      const InBlock there(home);
      check_block_lives();
      work();
    });
  }
}

InBlock::InBlock(Block* target) : before_(block) {
  block = target;
}

void check_block_lives() {
  if (block->live > 0 || cluster->blocks.size() == 1) return;
  fail("the shared memory of block %u of the cluster is touched after its threads have exited", block->rank);
}

InBlock::~InBlock() {
  block = before_;
}

bool is_overlapped() {
  return call->overlapped;
}

bool overlaps_launches() {
  return current_device().compute_capability == 90;  // others run PTX of older architectures
}

void griddepcontrol_wait() {
  self->waited = true;
}

bool in_closure(const void* pointer, size_t bytes) {
  const auto* p = static_cast<const char*>(pointer);
  const auto* begin = static_cast<const char*>(call->closure);
  return p >= begin && p + bytes <= begin + call->closure_bytes;
}

cudaError_t run(const KernelCall& kernel_call) {
  if (!last_error.empty()) return cudaErrorLaunchFailure;
  if (block != nullptr) return cudaErrorNotSupported;
  call = &kernel_call;
  running_kernel = kernel_name(kernel_call.name);
  if (const cudaError_t error = check_configuration(); error != cudaSuccess) return error;
  launch_log += format_text("%s <<<(%u, %u, %u), (%u, %u, %u), %zu>>>%s\n", running_kernel.c_str(), call->grid.x,
                            call->grid.y, call->grid.z, call->block.x, call->block.y, call->block.z, call->smem_bytes,
                            call->overlapped ? " overlapped" : "");
  if (!call->overlapped) forget_writes();
  random_state = options.seed * 0x9E3779B97F4A7C15u + 1;
  fault_location = nullptr;
  map_shared(kernel_call.shared_anchor, kernel_call.smem_bytes, call->cluster_size);

  std::vector<uint64_t> order(uint64_t{call->grid.x} * call->grid.y * call->grid.z / call->cluster_size);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (options.seed != 0) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  const FaultGuard guard;
  try {
    for (const uint64_t index : order) run_cluster(index * call->cluster_size);
  } catch (const LaunchFailed&) {
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace simt
