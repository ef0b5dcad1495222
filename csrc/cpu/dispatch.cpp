// Picks the instruction set, once, from the machine and the environment; tests may pick a lesser one.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernel_table.h"

namespace moekernels {
namespace {

constexpr CpuIsa kAll[] = {CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16, CpuIsa::kAmx};

const cpu::KernelTable* table_of(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return cpu::portable_kernels();
    case CpuIsa::kAvx2:
      return cpu::avx2_kernels();
    case CpuIsa::kAvx512:
      return cpu::avx512_kernels();
    case CpuIsa::kAvx512Bf16:
      return cpu::avx512bf16_kernels();
    case CpuIsa::kAmx:
      return cpu::amx_kernels();
  }
  return nullptr;
}

#if defined(MOEKERNELS_EMULATED_TILES)
bool has_tiles() {
  return true;  // tests/amx
}
#elif defined(__x86_64__)
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAll) == kAll;
}

// Tile registers are large, so Linux lets a process use them only after it has asked. Refused where the kernel is too
// old or a thread's signal stack too small for them.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool has_tiles() {
  return has_amx() && may_use_tiles();
}
#endif

bool machine_has(CpuIsa isa) {
#if defined(__x86_64__)
  // Not every compiler can ask for F16C, which no processor with AVX2 lacks.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case CpuIsa::kPortable:
      return true;
    case CpuIsa::kAvx2:
      return avx2;
    case CpuIsa::kAvx512:
      return avx512;
    case CpuIsa::kAvx512Bf16:
      return avx512bf16;
    case CpuIsa::kAmx:
      return avx512bf16 && has_tiles();
  }
  return false;
#else
  return isa == CpuIsa::kPortable;
#endif
}

CpuIsa best_up_to(CpuIsa isa) {
  for (int32_t i = static_cast<int32_t>(isa); i > 0; --i) {
    const CpuIsa candidate = static_cast<CpuIsa>(i);
    if (table_of(candidate) != nullptr && machine_has(candidate)) return candidate;
  }
  return CpuIsa::kPortable;
}

// What the environment lets this machine be; anything where it names no instruction set.
CpuIsa allowed_isa() {
  const char* name = std::getenv("MOEKERNELS_CPU_ISA");
  if (name != nullptr) {
    for (CpuIsa isa : kAll) {
      if (std::strcmp(name, name_of(isa)) == 0) return isa;
    }
  }
  return CpuIsa::kAmx;
}

std::atomic<CpuIsa>& current() {
  static std::atomic<CpuIsa> isa{best_cpu_isa()};
  return isa;
}

}  // namespace

const char* name_of(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return "portable";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
    case CpuIsa::kAmx:
      return "amx";
  }
  return "unknown";
}

CpuIsa best_cpu_isa() {
  static const CpuIsa best = best_up_to(allowed_isa());
  return best;
}

CpuIsa current_cpu_isa() {
  return current().load(std::memory_order_relaxed);
}

void set_cpu_isa(CpuIsa isa) {
  current().store(best_up_to(std::min(isa, best_cpu_isa())), std::memory_order_relaxed);
}

const Parallel& serial() {
  static const Parallel instance{
      [](void*, int64_t num_tasks, Parallel::Body body, void* context) { body(context, 0, num_tasks); },
      [](void*, int64_t num_bytes) -> void* {
        thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
        memory.reset(std::aligned_alloc(64, static_cast<size_t>(num_bytes + 63) / 64 * 64));
        return memory.get();
      },
      nullptr, 1};
  return instance;
}

const cpu::KernelTable& cpu::kernels() {
  return *table_of(current_cpu_isa());
}

}  // namespace moekernels
