// Kernels with a fault to choose: 0 is the right program, every other number breaks one rule.
#include "cuda/common/launch.cuh"
#include "cuda/ptx/ptx.cuh"

namespace {

using namespace moekernels;

enum Fault : int {
  kNone = 0,
  kMissingSyncthreads = 1,
  kDynamicOverrun = 2,
  kStaticOverrun = 3,
  kLaneMissing = 5,
  kBarrierCount = 6,
  kEndlessLoop = 7,
  kNullPointer = 8,
  kMissingSyncwarp = 9,
  kOutputOverrun = 10,
  kReadAfterOverwrite = 11,
  kUnmaskedLane = 12,
  kDifferentInstructions = 13,
  kFarOverrun = 14,
  kBarrierSkipped = 15,
};

// in [64] -> out [64] = in reversed; 64 threads
__global__ void reverse_kernel(const int* in, int* out, int fault, int* null) {
  MOEKERNELS_DYNAMIC_SMEM(raw);
  __shared__ int fixed[64];
  int* tile = reinterpret_cast<int*>(raw);
  const int i = static_cast<int>(threadIdx.x);
  const int lane = i % 32;

  tile[i] = in[i];
  if (fault == kDynamicOverrun && i == 63) tile[64] = 1;
  if (fault == kFarOverrun && i == 63) tile[(1 << 20) + i] = 1;
  if (fault == kStaticOverrun) fixed[i + 1] = in[i];
  if (fault == kNullPointer) null[i] = 1;
  if (fault == kOutputOverrun) out[i + 1] = 1;
  if (fault == kEndlessLoop && i == 5) {
    volatile int spinning = 1;
    while (spinning != 0) {
    }
  }
  if (fault != kMissingSyncthreads) __syncthreads();
  const int reversed = tile[63 - i];
  if (fault == kReadAfterOverwrite) tile[i] = 0;

  if (fault == kLaneMissing) {
    if (lane != 7) out[i] = __shfl_xor_sync(0xFFFFFFFF, reversed, 1);
  } else if (fault == kUnmaskedLane) {
    out[i] = __shfl_xor_sync(0x0FFFFFFF, reversed, 1);
  } else if (fault == kDifferentInstructions) {
    out[i] = lane < 8 ? __shfl_xor_sync(0xFFFFFFFF, reversed, 1) : __any_sync(0xFFFFFFFF, reversed);
  }
  if (fault == kBarrierSkipped && i < 32) ptx::bar_sync(1, 64);
  if (fault == kBarrierCount) ptx::bar_sync(1, i < 32 ? 64 : 32);

  // Neighbours swap twice through shared memory, within a warp.
  fixed[i] = reversed;
  if (fault != kMissingSyncwarp) __syncwarp();
  const int neighbour = fixed[i ^ 1];
  __syncwarp();
  fixed[i] = neighbour;
  __syncwarp();
  out[i] = fixed[i ^ 1];
}

enum CopyFault : int {
  kNoWait = 1,
  kNoBarrier = 2,
  kNeverWaited = 3,
  kMisaligned = 4,
  kRefilledTooEarly = 5,
};

// in [chunks * 64] -> out [chunks * 64]: each chunk reversed on its way through two buffers; 16 threads of 4 ints each
__global__ void copy_kernel(const int* in, int* out, int chunks, int fault) {
  MOEKERNELS_DYNAMIC_SMEM(raw);
  const int* tiles = reinterpret_cast<const int*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  const auto load = [&](int chunk) {
    if (chunk < chunks) {
      const uint32_t shift = fault == kMisaligned && t == 3 ? 4 : 0;
      ptx::cp_async_16(ptx::smem_address(raw) + (chunk % 2) * 256 + t * 16 - shift, in + chunk * 64 + t * 4);
    }
    ptx::cp_async_commit_group();
  };
  load(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    load(chunk + 1);
    if (fault != kNoWait) ptx::cp_async_wait_group<1>();
    if (fault != kNoBarrier) __syncthreads();
    for (int i = 0; i < 4; ++i) out[chunk * 64 + t * 4 + i] = tiles[(chunk % 2) * 64 + 63 - (t * 4 + i)];
    if (fault != kRefilledTooEarly) __syncthreads();
  }
  if (fault == kNoWait) ptx::cp_async_wait_group<0>();
  if (fault == kNeverWaited) {
    ptx::cp_async_16(ptx::smem_address(raw) + t * 16, in + t * 4);
    ptx::cp_async_commit_group();
  }
}

}  // namespace

extern "C" {

cudaError_t reverse_with_fault(const int* in, int* out, int64_t fault) {
  return launch<reverse_kernel>({dim3(1), dim3(64), 64 * sizeof(int)}, in, out, static_cast<int>(fault),
                                static_cast<int*>(nullptr));
}

cudaError_t copy_with_fault(const int* in, int* out, int64_t chunks, int64_t fault) {
  return launch<copy_kernel>({dim3(1), dim3(16), 2 * 64 * sizeof(int)}, in, out, static_cast<int>(chunks),
                             static_cast<int>(fault));
}

cudaError_t too_many_threads(int* out) {
  return launch<reverse_kernel>({dim3(1), dim3(1025)}, static_cast<const int*>(out), out, 0, out);
}

cudaError_t too_much_shared_memory(int* out) {
  return launch<reverse_kernel>({dim3(1), dim3(64), 232449}, static_cast<const int*>(out), out, 0, out);
}

}  // extern "C"
