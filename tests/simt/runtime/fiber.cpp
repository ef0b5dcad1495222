#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

namespace simt {

#if defined(__x86_64__)

// Saves the callee-saved registers on the old stack, restores them from the new one.
asm(R"(
.text
.type simt_switch_stacks, @function
simt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stacks, .-simt_switch_stacks
)");

extern "C" void simt_switch_stacks(void** save, void* load);

void Fiber::prepare(void* stack, size_t bytes, Entry entry) {
  auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{63};
  auto* slots = reinterpret_cast<uintptr_t*>(top) - 8;  // six registers, `entry`, and a null return address
  for (int i = 0; i < 8; ++i) slots[i] = 0;
  slots[6] = reinterpret_cast<uintptr_t>(entry);
  stack_pointer_ = slots;
}

void Fiber::switch_between(Fiber& from, Fiber& to) {
  simt_switch_stacks(&from.stack_pointer_, to.stack_pointer_);
}

#else

void Fiber::prepare(void* stack, size_t bytes, Entry entry) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_between(Fiber& from, Fiber& to) {
  swapcontext(&from.context_, &to.context_);
}

#endif

char* StackPool::stack(size_t index) {
  while (stacks_.size() <= index) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) abort();
    stacks_.push_back(static_cast<char*>(memory) + page);
  }
  return stacks_[index];
}

}  // namespace simt
