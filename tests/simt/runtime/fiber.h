// Fibers: stacks that one OS thread switches between, one per emulated CUDA thread.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  using Entry = void (*)();

  // Prepares to call `entry` on the stack [stack, stack + bytes) at the first switch; `entry` must never return.
  void prepare(void* stack, size_t bytes, Entry entry);

  // Suspends `from`, the fiber that runs now, and resumes `to`.
  static void switch_between(Fiber& from, Fiber& to);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

// Equal stacks with an inaccessible page below each, kept between launches.
class StackPool {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;

  // The lowest address of stack `index`; maps it at first use.
  char* stack(size_t index);

 private:
  std::vector<char*> stacks_;
};

}  // namespace simt
