// Programmatic dependent launch: a kernel's blocks may become resident while the kernel before it still drains.
//
//   kernel:    begin_overlapped();                         // before it touches global memory
//   launcher:  config.overlap_previous = can_overlap_previous<kernel>();
//
// The two belong together: launched so, a kernel that does not wait would race with the one before it. Only code
// compiled for sm_90 or newer waits, and which code runs depends on how the library was built (PTX of an older
// architecture runs on newer GPUs), so the launcher asks the kernel itself.
//
// While this kernel is resident those before it may still write, back to the last one launched without overlap. So what
// they write is never read through the read-only path (ld.global.nc), which promises that nobody writes there.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cuda/common/launch.cuh"
#include "cuda/ptx/ptx.cuh"

namespace moekernels {

// Lets the next kernel become resident as soon as every block of this one is, then waits for the previous kernel's
// results. The next kernel waits for all of this one in turn, so the order of reads and writes is as without overlap.
__device__ __forceinline__ void begin_overlapped() {
#if defined(MOEKERNELS_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
#endif
}

// MOEKERNELS_CUDA_OVERLAP=off lets every kernel start only once the one before it has ended: a fault that then goes
// away is one of overlap.
inline bool is_overlap_allowed() {
  static const bool allowed = [] {
    const char* setting = std::getenv("MOEKERNELS_CUDA_OVERLAP");
    return setting == nullptr || std::strcmp(setting, "off") != 0;
  }();
  return allowed;
}

// Whether the code of kKernel that the current device runs was compiled for sm_90 or newer.
template <auto kKernel>
bool can_overlap_previous() {
  if (!is_overlap_allowed()) return false;
#ifdef MOEKERNELS_SIMT
  return ::simt::overlaps_launches();
#else
  enum : signed char { kUnknown, kYes, kNo };
  static std::atomic<signed char> known[kMaxDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kMaxDevices) return false;
  signed char answer = known[device].load(std::memory_order_relaxed);
  if (answer == kUnknown) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)) != cudaSuccess) return false;
    answer = attributes.ptxVersion >= 90 ? kYes : kNo;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == kYes;
#endif
}

}  // namespace moekernels
