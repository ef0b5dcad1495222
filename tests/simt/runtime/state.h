// The state of the emulated device: the block that runs now, its threads and its warps.
//
// One OS thread does everything; clusters of blocks, mostly of one, run one after another. A CUDA thread is a fiber
// that runs until it must wait for another, or until chance makes it step aside. `self` is the thread whose fiber runs,
// null while the scheduler does.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"
#include "fiber.h"
#include "shadow.h"

namespace simt {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kNamedBarriers = 16;

// When asynchronous work takes effect: at once, as late as the rules allow, or at random times.
enum class Timing : int { kEager = 0, kLate = 1, kRandom = 2 };

struct Options {
  uint64_t seed = 1;  // 0: threads and blocks in order
  Timing timing = Timing::kRandom;
  bool check_races = true;
  uint32_t smem_offset = 0;      // from a multiple of 1024 to where dynamic shared memory starts
  double watchdog_seconds = 20;  // CPU time without progress: an endless loop, or threads that poll in vain
};

constexpr unsigned kMaxCluster = 8;

struct Block;
struct Warp;

// Groups of pending work, oldest first, and the group that is being filled.
template <class Work>
struct Groups {
  std::vector<Work> open;
  std::deque<std::vector<Work>> committed;

  bool empty() const {
    for (const auto& group : committed) {
      if (!group.empty()) return false;
    }
    return open.empty();
  }

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }

  // Does the work of all but the newest `pending` groups.
  template <class Do>
  void retire(size_t pending, Do&& work) {
    while (committed.size() > pending) {
      for (auto& item : committed.front()) work(item);
      committed.pop_front();
    }
  }
};

// One cp.async of 16 bytes.
struct CopyAsync {
  uint32_t dst;
  const void* src;
  uint32_t src_bytes;
  bool done;
};

// What cp.async.mbarrier.arrive.noinc waits for on a thread's behalf.
struct CopyBatch {
  std::vector<CopyAsync> copies;
  uint32_t time = 0;  // of the thread, when it handed them over
  bool done = false;
};

// A bulk copy out of shared memory, and the time of its reads.
struct BulkStore {
  std::function<void()> work;
  uint32_t time;
};

// Why a thread waits: a place, and a printf format for up to three numbers (%llu, %llx), put together only when
// somebody asks.
struct Wait {
  const char* place = "";
  const char* format = "";
  unsigned long long numbers[3] = {};
};

struct Thread {
  enum class State { kReady, kWaiting, kPolling, kExited };

  Fiber fiber;
  unsigned linear = 0;
  uint3 index{};
  Block* block = nullptr;
  uint32_t agent = 0;  // in the clocks
  Warp* warp = nullptr;
  unsigned lane = 0;
  const char* stack = nullptr;  // its lowest address
  State state = State::kReady;
  bool waited = false;  // for the kernel before this one
  bool at_cluster_barrier = false;
  uint64_t cluster_phase = 0;  // in which it arrived there
  Wait wait;
  Clock clock;
  uint64_t barrier_result[3] = {};
  Groups<CopyAsync> copies;
  std::vector<std::shared_ptr<CopyBatch>> batches;  // that may be under way
  Groups<BulkStore> bulk_stores;

  // This thread's own time.
  uint32_t& now() { return clock.seen[agent]; }
  // After others have learnt of everything up to now, what follows is later.
  void release() { ++now(); }
};

// Lanes of a warp that meet at one instruction. Each lane's data lives on its own stack; the last one to come calls
// `finish` for all.
struct Meeting {
  using Finish = void (*)(Warp& warp, Thread* const lanes[kWarpSize], void* const data[kWarpSize], uint32_t mask);
  const char* name;
  uint32_t mask;
  uint32_t arrived;
  Thread* lanes[kWarpSize];
  void* data[kWarpSize];
  Finish finish;
};

// One wgmma as one warp sees it: its 16 rows of the 64.
struct WarpMultiply {
  unsigned accumulator;  // index into WarpMatrix::accumulators
  uint64_t desc_a;
  uint64_t desc_b;
  bool transposed_a;
  bool transposed_b;
  bool accumulate;
  bool half;      // fp16, else bf16
  uint32_t time;  // of its reads
  Clock clock;    // what every lane knew at issue
  bool done;
};

// 16 rows of an accumulator that is in flight. The lanes' own copies hold a poison meanwhile.
struct FlightAccumulator {
  unsigned columns = 0;
  unsigned users = 0;  // multiplications not yet waited for
  float* lanes[kWarpSize] = {};
  std::vector<float> values;  // [16, columns]
};

struct WarpMatrix {
  bool fenced = false;
  uint64_t issued = 0;
  std::vector<FlightAccumulator> accumulators;
  Groups<WarpMultiply> multiplies;
  uint32_t time = 0;     // of the newest multiplication
  uint32_t retired = 0;  // of the newest one that was waited for
};

struct Warp {
  unsigned index = 0;
  uint32_t live = 0;  // lanes that exist and have not exited
  std::deque<Meeting> meetings;
  WarpMatrix matrix;
  unsigned registers = 0;  // per thread, moved by setmaxnreg
};

// What must be equal in the four warps of a warpgroup.
struct MultiplyShape {
  uint64_t desc_a;
  uint64_t desc_b;
  unsigned columns;
  unsigned flags;
  bool operator==(const MultiplyShape& other) const {
    return desc_a == other.desc_a && desc_b == other.desc_b && columns == other.columns && flags == other.flags;
  }
};

struct Barrier {
  unsigned expected = 0;  // threads, 0 while nobody is there
  unsigned arrived = 0;
  std::vector<Thread*> waiting;
  Clock clock;
  uint64_t count = 0;  // threads whose predicate held
};

struct MBarrier {
  uint32_t expected = 0;
  uint32_t pending = 0;
  int64_t bytes = 0;  // expected and not yet arrived
  uint32_t phase = 0;
  uint32_t owner = 0;   // the thread that initialised it,
  uint32_t born = 0;    // its time then,
  bool fenced = false;  // and whether it has fenced since
  Clock arriving;       // what the arrivals of this phase know
  Clock complete;       // what a completed phase passes on
  std::vector<Thread*> waiting;
};

// Blocks that run at the same time and reach into each other's shared memory. What threads and engines wait for is
// common to them.
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  std::vector<Thread*> ready;
  std::vector<Thread*> polling;
  std::vector<std::function<void()>> engine;  // asynchronous work that may be done at any time, in any order
  unsigned live = 0;

  // barrier.cluster
  uint64_t phase = 0;
  unsigned arrived = 0;
  Clock arriving;
  Clock complete;
  std::vector<Thread*> waiting;
};

struct Block {
  dim3 grid;
  dim3 shape;
  uint3 index{};
  unsigned rank = 0;  // in its cluster
  unsigned num_threads = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::vector<MultiplyShape>> multiply_log;  // per warpgroup
  Barrier barriers[kNamedBarriers];
  std::map<uint32_t, MBarrier> mbarriers;
  uint32_t mbarriers_begin = ~0u;  // addresses that contain them all
  uint32_t mbarriers_end = 0;
  std::vector<Thread*> register_queue;  // threads that wait in setmaxnreg.inc
  unsigned live = 0;
  unsigned free_registers = 0;
  uint32_t engine_time = 0;

  // Agents of the clocks, block by block of the cluster: the threads, the engine that TMA writes as, and each warp's
  // wgmma reads.
  uint32_t agents_per_block() const { return num_threads + 1 + (num_threads + kWarpSize - 1) / kWarpSize; }
  uint32_t first_agent() const { return rank * agents_per_block(); }
  uint32_t engine_agent() const { return first_agent() + num_threads; }
  uint32_t matrix_agent(const Warp& warp) const { return engine_agent() + 1 + warp.index; }
  size_t num_agents() const;
};

extern Cluster* cluster;

inline size_t Block::num_agents() const {
  return cluster->blocks.size() * agents_per_block();
}

// Where `block` is another of the cluster for a while.
class InBlock {
 public:
  explicit InBlock(Block* target);
  ~InBlock();

 private:
  Block* before_;
};

// Fails where `block` has ended and others of the cluster have not.
void check_block_lives();

extern Options options;
extern uint64_t progress;           // moves whenever a waiting thread may have reason to look again
extern const void* fault_location;  // set when a signal ended the kernel
extern Block* block;
extern Thread* self;

Shadow& shadow();  // of the block's shared memory

// ---- scheduler.cpp ----

uint64_t random_below(uint64_t n);
bool chance(unsigned one_in);

// Ends the launch with this message; from a thread or from the engine.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void wait_here(const Wait& wait);  // until someone calls wake
void poll_here(const Wait& wait);  // until something has happened in the block
void maybe_step_aside();           // lets another thread run first, by chance
void wake(Thread* thread);
void submit(std::function<void()> work);  // to the engine, or at once
std::string describe(const Thread& thread);
std::string describe_call_site();  // of the running thread, as library+offset
void resume_scheduler();           // leaves the running fiber
std::string describe_agent(uint32_t agent);

// ---- shared_memory.cpp ----

constexpr uint32_t kNowhere = ~0u;

void map_shared(const void* module_anchor, size_t dynamic_bytes,
                unsigned cluster_size);           // before a kernel's first block
void poison_shared();                             // before each block
uint32_t shared_address_of(const void* pointer);  // kNowhere if it is not shared memory
unsigned char* shared_pointer(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);

// An access of this thread: checks it against earlier ones, and records it.
void access_shared(uint32_t address, uint32_t bytes, Access access, const char* what);
void check_shared_write(uint32_t address, uint32_t bytes, const char* what);  // without recording
void check_async_read(uint32_t address, uint32_t bytes, const Clock& clock, const char* what);

// ---- global_memory.cpp ----

void check_global(const void* pointer, size_t bytes, Access access, const char* what);
void check_waited(const char* what);  // for the kernel before, where the two overlap
void check_constant(const void* pointer, size_t bytes, const char* what);  // no launch that may still run wrote there
void on_access(const void* pointer, size_t bytes, Access access);          // by the running thread, to any memory

// ---- mbarrier.cpp ----

MBarrier& mbarrier_at(uint32_t address, const char* what);
void mbarrier_count(MBarrier& mbarrier, uint32_t arrivals, const char* what);
void mbarrier_complete_bytes(MBarrier& mbarrier, int64_t bytes);
std::string describe_mbarriers();  // those that threads wait for
bool overlaps_mbarrier(uint32_t address, uint32_t bytes);

// ---- warp.cpp ----

void meet(const char* name, uint32_t mask, void* data, Meeting::Finish finish);
void finish_meetings_after_exit(Warp& warp);

// ---- barriers.cpp ----

void finish_barriers_after_exit();
void finish_cluster_barrier_after_exit(const Thread& thread);

// ---- signals.cpp ----

// Turns memory faults of a kernel, and a thread that never comes back, into `fail`. One exists while a launch runs.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
};

// ---- end of a thread: what must not be left pending ----

void check_copies_done(const Thread& thread);
void check_matrix_done(const Warp& warp);
void check_mbarriers_done();

}  // namespace simt
