// Launching a kernel on the CPU: what csrc/cuda/launch.cuh calls in place of the CUDA runtime.
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

template <class Body>
cudaError_t launch(const char* name, dim3 grid, dim3 block, size_t smem_bytes, const Body& body) {
  shared_anchor = 0;  // its first use allocates the library's thread_local block
  const auto invoke = [](const void* closure) { (*static_cast<const Body*>(closure))(); };
  return run({name, grid, block, smem_bytes, invoke, &body, sizeof body, const_cast<const char*>(&shared_anchor)});
}

// Dynamic shared memory of the running block.
unsigned char* dynamic_smem();

}  // namespace simt
