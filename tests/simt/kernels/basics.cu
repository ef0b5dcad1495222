// Small kernels that use the built-ins of CUDA rightly; each has a result that is easy to predict.
#include <cassert>

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"

namespace {

using namespace moekernels;

// in [blocks, threads] -> out [blocks]: the sum of each row, by shuffles and one word of shared memory per warp
__global__ void block_sum_kernel(const float* in, float* out) {
  __shared__ float partial[32];
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  float sum = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, offset);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += partial[i];
    out[blockIdx.x] = total;
  }
}

// Every result of the warp-wide built-ins, one row of 16 words per lane; only `active` lanes stay to the end.
__global__ void warp_kernel(int* out, int active) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= active) return;
  const unsigned mask = active == 32 ? 0xFFFFFFFF : (1u << active) - 1;
  int* row = out + lane * 16;
  row[0] = __shfl_sync(mask, lane, 3);
  row[1] = __shfl_up_sync(mask, lane, 2);
  row[2] = __shfl_down_sync(mask, lane, 1, 8);
  row[3] = __shfl_xor_sync(mask, lane, 1);
  row[4] = static_cast<int>(__ballot_sync(mask, lane % 3 == 0));
  row[5] = __any_sync(mask, lane == 5);
  row[6] = __all_sync(mask, lane < 7);
  row[7] = static_cast<int>(__match_any_sync(mask, lane / 4));
  row[8] = __reduce_add_sync(mask, lane);
  row[9] = __reduce_max_sync(mask, -lane);
  row[10] = static_cast<int>(__shfl_sync(mask, 1LL << 40, 0) >> 40);
  row[11] = __popc(mask) + __ffs(8) + __clz(1);
}

// Halves of a warp that go different ways and shuffle among themselves.
__global__ void divergent_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(0x0000FFFF, lane, 1);
  } else {
    out[lane] = __shfl_xor_sync(0xFFFF0000, lane, 2);
  }
  __syncwarp();
  out[32 + lane] =
      __syncthreads_count(lane < 10) * 100 + (__syncthreads_or(lane == 40) != 0) * 10 + (__syncthreads_and(1) != 0);
}

// counts [8] and total [1], zero before: the last block to finish writes the sum of all counts
__global__ void last_block_kernel(unsigned* counts, unsigned* finished, unsigned* total) {
  __shared__ bool last;
  atomicAdd(&counts[(blockIdx.x * blockDim.x + threadIdx.x) % 8], 1u);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(finished, 1u) + 1 == gridDim.x;
  __syncthreads();
  if (last && threadIdx.x == 0) {
    unsigned sum = 0;
    for (int i = 0; i < 8; ++i) sum += counts[i];
    *total = sum;
  }
}

// Reverses 256 elements per block through dynamic shared memory; T of any type.
template <class T>
__global__ void reverse_kernel(const T* in, T* out) {
  MOEKERNELS_DYNAMIC_SMEM(raw);
  T* tile = reinterpret_cast<T*>(raw);
  const unsigned base = (blockIdx.y * gridDim.x + blockIdx.x) * 256;
  const unsigned i = threadIdx.y * blockDim.x + threadIdx.x;
  tile[i] = in[base + i];
  __syncthreads();
  out[base + i] = from_float<T>(to_float(tile[255 - i]));
}

// Shared memory that nobody has written; every block leaves its mark behind.
__global__ void uninitialised_kernel(int* out) {
  MOEKERNELS_DYNAMIC_SMEM(raw);
  __shared__ int fixed;
  int* dynamic = reinterpret_cast<int*>(raw);
  out[2 * blockIdx.x] = fixed;
  out[2 * blockIdx.x + 1] = *dynamic;
  fixed = *dynamic = 7;
}

__device__ int device_variable = 3;

__global__ void assert_kernel(int* out, int expected) {
  assert(device_variable == expected);
  out[0] = device_variable;
}

// Waits for a value that another block would have to write.
__global__ void spin_kernel(int* flag) {
  while (atomicAdd(flag, 0) == 0) {
  }
}

__global__ void vector_kernel(const __nv_bfloat16* in, __nv_bfloat16* out) {
  store_vec16(out + threadIdx.x * 8, load_vec16(in + threadIdx.x * 8));
}

}  // namespace

extern "C" {

cudaError_t block_sum(const float* in, float* out, int64_t blocks, int64_t threads) {
  return launch<block_sum_kernel>({dim3(blocks), dim3(threads)}, in, out);
}

cudaError_t warp(int* out, int64_t active) {
  return launch<warp_kernel>({dim3(1), dim3(32)}, out, static_cast<int>(active));
}

cudaError_t divergent(int* out) {
  return launch<divergent_kernel>({dim3(1), dim3(32)}, out);
}

cudaError_t last_block(unsigned* counts, unsigned* finished, unsigned* total, int64_t blocks) {
  return launch<last_block_kernel>({dim3(blocks), dim3(64)}, counts, finished, total);
}

cudaError_t reverse(const void* in, void* out, int64_t dtype, int64_t grid_x, int64_t grid_y) {
  return dispatch_dtype(static_cast<DType>(dtype), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return launch<reverse_kernel<T>>({dim3(grid_x, grid_y), dim3(32, 8), 256 * sizeof(T)}, static_cast<const T*>(in),
                                     static_cast<T*>(out));
  });
}

cudaError_t vector_copy(const __nv_bfloat16* in, __nv_bfloat16* out) {
  return launch<vector_kernel>({dim3(1), dim3(16)}, in, out);
}

cudaError_t uninitialised(int* out, int64_t blocks) {
  return launch<uninitialised_kernel>({dim3(blocks), dim3(1), 4}, out);
}

cudaError_t assertion(int* out, int64_t expected) {
  return launch<assert_kernel>({dim3(1), dim3(1)}, out, static_cast<int>(expected));
}

cudaError_t spin(int* flag) {
  return launch<spin_kernel>({dim3(1), dim3(64)}, flag);
}

cudaError_t device_query(int* out) {
  DeviceInfo info;
  const cudaError_t error = device_info(&info);
  if (error != cudaSuccess) return error;
  out[0] = info.sm_count;
  out[1] = info.compute_capability;
  out[2] = info.max_smem_bytes;
  return cudaSuccess;
}

}  // extern "C"
