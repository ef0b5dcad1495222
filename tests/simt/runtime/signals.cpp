// Memory faults of a kernel, and threads that never come back, become failures of the launch.
#include <signal.h>
#include <sys/time.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

#include "state.h"

namespace simt {
namespace {

constexpr int kTicksPerSecond = 10;
alignas(64) char handler_stack[64 * 1024];
alignas(64) char landing_stack[256 * 1024];  // the thread's own may be exhausted

struct sigaction old_fault;
struct sigaction old_bus;
struct sigaction old_timer;
stack_t old_stack;
const void* fault_address;
bool timed_out;
uint64_t progress_at_tick;
int idle_ticks;

[[noreturn]] void land() {
  if (timed_out) {
    fail(
        "no progress: threads run on and on, but none arrives anywhere (an endless loop, or a wait for another block)");
  }
  fail("memory fault at %p (a stray pointer, an overrun, or a full stack)", fault_address);
}

// Lets the interrupted thread go on in `land`, on a stack that has room.
bool redirect(void* context) {
  auto top = reinterpret_cast<uintptr_t>(landing_stack) + sizeof landing_stack - 64;
  auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  fault_location = reinterpret_cast<const void*>(machine.gregs[REG_RIP]);
  machine.gregs[REG_RSP] = static_cast<greg_t>(top - 8);
  machine.gregs[REG_RIP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(&land));
  return true;
#elif defined(__aarch64__)
  fault_location = reinterpret_cast<const void*>(machine.pc);
  machine.sp = top;
  machine.pc = reinterpret_cast<uintptr_t>(&land);
  return true;
#else
  static_cast<void>(top);
  static_cast<void>(machine);
  return false;
#endif
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (self != nullptr) {
    fault_address = info->si_addr;
    timed_out = false;
    if (redirect(context)) return;
  }
  // Not ours: the old handler meets it when the instruction runs again.
  sigaction(signal, signal == SIGSEGV ? &old_fault : &old_bus, nullptr);
}

void on_tick(int, siginfo_t*, void* context) {
  if (self == nullptr) return;
  const bool idle = progress == progress_at_tick;
  progress_at_tick = progress;
  idle_ticks = idle ? idle_ticks + 1 : 0;
  if (idle_ticks < options.watchdog_seconds * kTicksPerSecond) return;
  timed_out = true;
  redirect(context);
}

void set_timer(int microseconds) {
  itimerval timer{};
  timer.it_interval.tv_usec = timer.it_value.tv_usec = microseconds;
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

struct sigaction action_of(void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = handler;
  // The handler of a fault leaves by changing the context, so the signal must not stay blocked while it runs.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
  return action;
}

}  // namespace

FaultGuard::FaultGuard() {
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &old_stack);
  const struct sigaction fault = action_of(on_fault);
  const struct sigaction tick = action_of(on_tick);
  sigaction(SIGSEGV, &fault, &old_fault);
  sigaction(SIGBUS, &fault, &old_bus);
  sigaction(SIGVTALRM, &tick, &old_timer);
  idle_ticks = 0;
  set_timer(1000000 / kTicksPerSecond);
}

FaultGuard::~FaultGuard() {
  set_timer(0);
  sigaction(SIGVTALRM, &old_timer, nullptr);
  sigaction(SIGSEGV, &old_fault, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
}

}  // namespace simt
