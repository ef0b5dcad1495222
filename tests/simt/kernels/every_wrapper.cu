// Calls every wrapper of ptx.cuh and wgmma.cuh once, to be compiled but not run: does each of them assemble?
#include "cuda/common/launch.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace moekernels;

__global__ void __launch_bounds__(128) sm80_kernel(const void* in, uint4* out, float* sums) {
  MOEKERNELS_DYNAMIC_SMEM(raw);
  const uint32_t tile = ptx::smem_address(raw);
  ptx::prefetch_global_l2(in);
  ptx::cp_async_16(tile, in);
  ptx::cp_async_16_hint(tile + 16, in, 8, ptx::createpolicy_evict_first() ^ ptx::createpolicy_evict_last());
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  ptx::cp_async_wait_all();
  ptx::st_shared_v4(tile, ptx::ld_global_v4_if(in, blockIdx.x == 0));
  ptx::st_shared_v4(tile + 16, ptx::ld_global_nc_v4_hint(in, ptx::createpolicy_evict_first()));
  ptx::st_shared_v4(tile + 32, ptx::ld_global_v4_keep(in));
  ptx::st_global_cs_v4(out, ptx::ld_shared_v4(tile));
  ptx::st_global_v4(out, ptx::ld_shared_v4(tile + 16));
  const float2 pair = ptx::ld_shared_v2(tile + 8);
  sums[0] = pair.x + pair.y + __uint_as_float(ptx::ld_shared_u32(tile + 4));
  uint32_t a[4];
  uint32_t b[4];
  ptx::ldmatrix_x4(a, tile);
  ptx::ldmatrix_x4_trans(b, tile);
  float d[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b[0], b[1]);
  ptx::mma_m16n8k16<__half>(d, a, b[2], b[3]);
  ptx::mma_m16n8k8_tf32(d, a, ptx::cvt_rna_tf32(d[0]), ptx::cvt_rna_tf32(d[1]));
  ptx::bar_arrive(1, 64);
  ptx::bar_sync(2, 64);
  for (float x : d) sums[threadIdx.x] += x;
}

template <class T, int kN, int kTransA, int kTransB>
__device__ void multiply(float* sums, uint64_t desc) {
  float d[kN / 2];
  for (float& x : d) x = 0;
  ptx::wgmma_keep(d);
  ptx::wgmma_fence();
  ptx::wgmma_m64k16<T, kN, kTransA, kTransB>(d, desc, desc, true);
  ptx::wgmma_commit_group();
  ptx::wgmma_keep(d);
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_keep(d);
  for (float x : d) sums[threadIdx.x] += x;
}

__global__ void __launch_bounds__(256, 1)
    sm90_kernel(const __grid_constant__ CUtensorMap map, const void* in, void* out, float* sums) {
#if MOEKERNELS_SM90A
  MOEKERNELS_DYNAMIC_SMEM(raw);
  const uint32_t tile = ptx::smem_address(raw);
  const uint32_t full = tile + 65536;
  const uint64_t policy = ptx::createpolicy_evict_first();
  ptx::griddepcontrol_wait();
  ptx::mbarrier_init(full, 1);
  ptx::fence_mbarrier_init();
  __syncthreads();
  if (threadIdx.x >= 128) {
    ptx::setmaxnreg_dec<40>();
    if (ptx::elect_one()) {
      ptx::prefetch_tensormap(&map);
      ptx::mbarrier_arrive_expect_tx(full, 64);
      ptx::mbarrier_expect_tx(full, 64);
      ptx::mbarrier_arrive(full);
      ptx::cp_async_mbarrier_arrive_noinc(full);
      ptx::tma_load_2d(tile, &map, full, 0, 0);
      ptx::tma_load_2d_hint(tile, &map, full, 0, 0, policy);
      ptx::tma_load_3d(tile, &map, full, 0, 0, 0);
      ptx::tma_load_3d_hint(tile, &map, full, 0, 0, 0, policy);
      ptx::bulk_load(tile, in, 16, full);
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    if (!ptx::mbarrier_try_wait_parity(full, 1)) ptx::mbarrier_wait(full, 0);
    const uint64_t desc = ptx::wgmma_descriptor(tile, 16, 1024, ptx::Swizzle::k128B);
    multiply<__nv_bfloat16, 8, 0, 0>(sums, desc);
    multiply<__nv_bfloat16, 16, 0, 1>(sums, desc);
    multiply<__nv_bfloat16, 32, 1, 0>(sums, desc);
    multiply<__nv_bfloat16, 64, 1, 1>(sums, desc);
    multiply<__half, 96, 0, 0>(sums, desc);
    multiply<__half, 128, 0, 0>(sums, desc);
    multiply<__half, 192, 0, 0>(sums, desc);
    multiply<__half, 256, 0, 0>(sums, desc);
    const uint32_t registers[4] = {};
    ptx::stmatrix_x4(tile, registers);
    ptx::fence_proxy_async();
    ptx::tma_store_2d(&map, tile, 0, 0);
    ptx::tma_store_3d(&map, tile, 0, 0, 0);
    ptx::bulk_store(out, tile, 16);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<0>();
    ptx::bulk_wait_group<0>();
    ptx::mbarrier_inval(full);
  }
  ptx::griddepcontrol_launch_dependents();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  ptx::tma_load_3d_multicast(tile, &map, full, 0, 0, 0, 3);
  ptx::mbarrier_arrive_cluster(ptx::mapa(full, ptx::cluster_ctarank()));
#endif
}

}  // namespace

extern "C" cudaError_t every_wrapper(const CUtensorMap* map, const void* in, uint4* out, float* sums) {
  const cudaError_t error = launch<sm80_kernel>({dim3(1), dim3(128)}, in, out, sums);
  if (error != cudaSuccess) return error;
  return launch<sm90_kernel>({dim3(1), dim3(256)}, *map, in, static_cast<void*>(out), sums);
}
