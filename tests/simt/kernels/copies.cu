// TMA and bulk copies on their own: what lands where.
#include "cuda/common/launch.cuh"
#include "cuda/gemm/tensor_map.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace moekernels;

// Loads one box to shared memory and writes it out twice: the raw bytes to `image`, and through the map to a second
// tensor.
__global__ void box_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                           uint4* image, int bytes, int x, int y, int z) {
#if MOEKERNELS_SM90A
  MOEKERNELS_DYNAMIC_SMEM(given);
  __shared__ uint64_t barrier;
  const uint32_t tile = ptx::smem_address(ptx::align_for_swizzle(given));
  const uint32_t full = ptx::smem_address(&barrier);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_expect_tx(full, bytes);
    ptx::tma_load_3d(tile, &from, full, x, y, z);
    ptx::mbarrier_arrive(full);
  }
  while (!ptx::mbarrier_try_wait_parity(full, 0)) {
  }
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += 32) image[i] = ptx::ld_shared_v4(tile + i * 16);
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store_3d(&to, tile, x, y, z);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group<0>();
    ptx::mbarrier_inval(full);
  }
#endif
}

// in [1024] bytes -> out: each of 4 chunks goes through shared memory, one is incremented on the way
__global__ void bulk_kernel(const unsigned char* in, unsigned char* out, bool overwrite_in_flight) {
#if MOEKERNELS_SM90A
  MOEKERNELS_DYNAMIC_SMEM(raw);
  const uint32_t tile = ptx::smem_address(raw);
  const uint32_t full = tile + 1024;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, 1024);
    for (int i = 0; i < 4; ++i) ptx::bulk_load(tile + i * 256, in + i * 256, 256, full);
  }
  __syncthreads();
  ptx::mbarrier_wait(full, 0);
  for (unsigned i = threadIdx.x; i < 256; i += 32) raw[256 + i] += 1;
  ptx::fence_proxy_async();
  __syncwarp();
  if (ptx::elect_one()) {
    for (int i = 0; i < 4; ++i) {
      ptx::bulk_store(out + i * 256, tile + i * 256, 256);
      ptx::bulk_commit_group();
    }
    if (overwrite_in_flight) raw[0] = 0;
    ptx::bulk_wait_group_read<0>();
    raw[0] = 0;
  }
#endif
}

}  // namespace

extern "C" {

// from, to: [depth, rows, columns] 16-bit
cudaError_t box(const void* from, void* to, uint4* image, int64_t columns, int64_t rows, int64_t depth,
                int64_t box_columns, int64_t box_rows, int64_t swizzle, int64_t x, int64_t y, int64_t z) {
  CUtensorMap from_map;
  CUtensorMap to_map;
  TensorMapSource source{from, DType::kFloat16, columns, rows, depth, columns, rows * columns};
  const auto mode = static_cast<CUtensorMapSwizzle>(swizzle);
  const auto box_x = static_cast<int32_t>(box_columns);
  const auto box_y = static_cast<int32_t>(box_rows);
  if (const cudaError_t error = make_tensor_map(&from_map, source, box_x, box_y, mode)) return error;
  source.data = to;
  if (const cudaError_t error = make_tensor_map(&to_map, source, box_x, box_y, mode)) return error;
  const int bytes = box_x * box_y * 2;
  return launch<box_kernel>({dim3(1), dim3(32), static_cast<size_t>(bytes) + ptx::kSwizzleAlignment}, from_map, to_map,
                            image, bytes, static_cast<int>(x), static_cast<int>(y), static_cast<int>(z));
}

cudaError_t bulk(const unsigned char* in, unsigned char* out, int64_t overwrite_in_flight) {
  return launch<bulk_kernel>({dim3(1), dim3(32), 1024 + 8}, in, out, overwrite_in_flight != 0);
}

}  // extern "C"
