// Launching a kernel on the CPU: what csrc/cuda/common/launch.cuh calls in place of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include "scheduler.h"

namespace simt {

// One thread_local of each kernel library, through which the runtime finds the others.
namespace {
thread_local volatile char shared_anchor;
}

// Runs all blocks; anything but cudaSuccess leaves its reason in last_error.
cudaError_t run(const KernelCall& call);

// Whether the device has programmatic dependent launch.
bool overlaps_launches();

template <class Body>
cudaError_t launch(const char* name, dim3 grid, dim3 block, size_t smem_bytes, bool overlapped, unsigned cluster_size,
                   const Body& body) {
  shared_anchor = 0;  // its first use allocates the library's thread_local block
  const auto invoke = [](const void* closure) { (*static_cast<const Body*>(closure))(); };
  const auto* const anchor = const_cast<const char*>(&shared_anchor);
  return run({name, grid, block, smem_bytes, overlapped, cluster_size, invoke, &body, sizeof body, anchor});
}

// Dynamic shared memory of the running block.
unsigned char* dynamic_smem();

}  // namespace simt
