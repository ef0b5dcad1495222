// Launching kernels, and what the launcher needs to know of the device.
//
// How to write a kernel here
// --------------------------
//   template <class Traits>
//   __global__ void __launch_bounds__(Traits::kThreads) permute_kernel(PermuteParams params) { ... }
//
//   template <class Traits>
//   cudaError_t launch_permute(const PermuteParams& params, cudaStream_t stream) {
//     const LaunchConfig config{dim3(blocks), dim3(Traits::kThreads), /*smem_bytes=*/0, stream};
//     return launch<permute_kernel<Traits>>(config, params);
//   }
//
//   cudaError_t run(const PermuteParams& params, cudaStream_t stream) {
//     return dispatch_dtype(params.dtype, [&](auto tag) { ... launch_permute<...>(params, stream) ... });
//   }
//
// The same source is compiled by nvcc and, with MOEKERNELS_SIMT, by g++ to run on the CPU (tests/simt), so:
//   - launch with `launch<kernel>(config, args...)`, never <<<>>>; arguments go by value, with exactly the types of
//     the kernel's parameters. A grid with a zero dimension launches nothing and succeeds.
//   - take dynamic shared memory by `MOEKERNELS_DYNAMIC_SMEM(name);`, which declares `unsigned char* name`, and its
//     size from LaunchConfig::smem_bytes (`launch` lifts the 48 KB limit). It is aligned to 16 bytes; kernels that need
//     more align it themselves. It is not cleared, nor are static __shared__ arrays: write before reading.
//   - PTX only through ptx.cuh and wgmma.cuh. A Hopper kernel's body stands inside `#if MOEKERNELS_SM90A ... #endif`.
//   - a tensor map is a `const __grid_constant__ CUtensorMap` parameter, made by tensor_map.cuh.
//   - shuffles, votes, ldmatrix and mma do not order memory: what lanes hand each other through shared memory needs
//     __syncwarp() or __syncthreads(). Masks name exactly the lanes that call.
//   - blocks must not wait for each other: they run one after another there. "The last block to arrive" (an atomic
//     counter after __threadfence()) is fine.
//   - floating-point atomics are out (results must not depend on order), and so is any host synchronisation.
//   - min, max, fminf, ... take arguments of one type. Use __expf, rsqrtf, __ldg and the like freely.
// tests/simt/conftest.py says how to test a launcher there, and what is checked.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#ifdef MOEKERNELS_SIMT
#include "launch_emulated.h"
#define MOEKERNELS_DYNAMIC_SMEM(name) unsigned char* const name = ::simt::dynamic_smem()
#else
#define MOEKERNELS_DYNAMIC_SMEM(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace moekernels {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;  // as a mask of lanes
constexpr int kMaxDevices = 64;

struct DeviceInfo {
  int device;              // the current device's number
  int sm_count;            // multiprocessors
  int compute_capability;  // 80, 90, ...
  int max_smem_bytes;      // dynamic shared memory one block may have
};

// The current device's properties, asked for once per device.
inline cudaError_t device_info(DeviceInfo* info) {
  static std::mutex mutex;
  static DeviceInfo known[kMaxDevices];  // sm_count is 0 where nobody has asked yet

  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[device].sm_count == 0) {
    DeviceInfo found{device, 0, 0, 0};
    int major = 0;
    int minor = 0;
    const auto ask = [device](int* value, cudaDeviceAttr attribute) {
      return cudaDeviceGetAttribute(value, attribute, device);
    };
    cudaError_t error = ask(&found.sm_count, cudaDevAttrMultiProcessorCount);
    if (error == cudaSuccess) error = ask(&major, cudaDevAttrComputeCapabilityMajor);
    if (error == cudaSuccess) error = ask(&minor, cudaDevAttrComputeCapabilityMinor);
    if (error == cudaSuccess) error = ask(&found.max_smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (error != cudaSuccess) return error;
    found.compute_capability = 10 * major + minor;
    known[device] = found;
  }
  *info = known[device];
  return cudaSuccess;
}

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t smem_bytes = 0;  // dynamic shared memory
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;           // blocks, neighbours along x, that run at the same time; sm_90 and newer
  bool overlap_previous = false;  // programmatic dependent launch: the kernel calls begin_overlapped (overlap.cuh)
};

#ifndef MOEKERNELS_SIMT
// Lets `kKernel` use `bytes` of dynamic shared memory on the current device; remembers what it has asked for.
template <auto kKernel>
cudaError_t allow_dynamic_smem(size_t bytes) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  static std::atomic<size_t> allowed[kMaxDevices];
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (bytes <= allowed[device].load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) allowed[device].store(bytes, std::memory_order_relaxed);
  return error;
}
#endif

// Enqueues kKernel(args...) and reports what the launch itself can go wrong with.
template <auto kKernel, class... Args>
cudaError_t launch(const LaunchConfig& config, const Args&... args) {
  const dim3 grid = config.grid;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef MOEKERNELS_SIMT
  return ::simt::launch(__PRETTY_FUNCTION__, grid, config.block, config.smem_bytes, config.overlap_previous,
                        config.cluster, [args...] { kKernel(args...); });
#else
  if (const cudaError_t error = allow_dynamic_smem<kKernel>(config.smem_bytes); error != cudaSuccess) return error;
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.smem_bytes;
  launch_config.stream = config.stream;
  cudaLaunchAttribute attributes[2]{};
  launch_config.attrs = attributes;
  if (config.overlap_previous) {
    cudaLaunchAttribute& overlap = attributes[launch_config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (config.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[launch_config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {config.cluster, 1, 1};
  }
  return cudaLaunchKernelEx(&launch_config, kKernel, args...);
#endif
}

}  // namespace moekernels
