// Every PTX instruction the kernels use, one small wrapper each, named after the instruction.
//
// Shared memory is addressed by the 32-bit number that `smem_address` returns. What each instruction demands
// (alignment, which threads call it, what must come before it) stands above its wrapper. Built with MOEKERNELS_SIMT,
// the same names come from the CPU runtime in tests/simt/runtime, which checks those demands.
#pragma once

#include <cstdint>

// 1 where sm_90a code may be compiled: wrap the body of a Hopper kernel in `#if MOEKERNELS_SM90A`, so that a pass for
// another architecture compiles an empty kernel.
#if defined(MOEKERNELS_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOEKERNELS_SM90A 1
#else
#define MOEKERNELS_SM90A 0
#endif

#ifdef MOEKERNELS_SIMT
#include "ptx_emulated.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define MOEKERNELS_DEVICE __device__ __forceinline__

namespace moekernels::ptx {

MOEKERNELS_DEVICE uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- global and shared memory, 16, 8 or 4 bytes at a time, aligned so ----

// Read once and around L1 where `condition` holds; zeros, and no access, elsewhere. No branch, so that several can be
// under way.
MOEKERNELS_DEVICE uint4 ld_global_v4_if(const void* pointer, bool condition) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0; "
      "@p ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(pointer), "r"(static_cast<uint32_t>(condition)));
  return v;
}

// Read once, through the read-only path and around L1, with an L2 policy. Only for memory that nothing writes while
// this kernel is resident: weights, never what the kernel before writes, as the two may overlap (common/overlap.cuh).
MOEKERNELS_DEVICE uint4 ld_global_nc_v4_hint(const void* pointer, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer), "l"(policy));
  return v;
}

// Read again and again by the blocks of a multiprocessor: the last to leave L1.
MOEKERNELS_DEVICE uint4 ld_global_v4_keep(const void* pointer) {
  uint4 v;
  asm volatile("ld.global.L1::evict_last.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
}

// The compiler does not always make one store of an assignment of 16 bytes.
MOEKERNELS_DEVICE void st_global_v4(void* pointer, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Written once and not read again soon: evict first.
MOEKERNELS_DEVICE void st_global_cs_v4(void* pointer, const uint4& v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

MOEKERNELS_DEVICE uint4 ld_shared_v4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

MOEKERNELS_DEVICE uint32_t ld_shared_u32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

MOEKERNELS_DEVICE float2 ld_shared_v2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

MOEKERNELS_DEVICE void st_shared_v4(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// L2 policies for the `_hint` forms below.
MOEKERNELS_DEVICE uint64_t createpolicy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

MOEKERNELS_DEVICE uint64_t createpolicy_evict_last() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

MOEKERNELS_DEVICE void prefetch_global_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// ---- cp.async (sm_80): 16 bytes from global to shared memory, both 16-byte aligned ----

// Copies `src_bytes` (0 .. 16) and fills the rest with zeros. With 0 nothing is read, but `src` must be a valid
// address.
MOEKERNELS_DEVICE void cp_async_16(uint32_t dst, const void* src, uint32_t src_bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_bytes)
               : "memory");
}

MOEKERNELS_DEVICE void cp_async_16_hint(uint32_t dst, const void* src, uint32_t src_bytes, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(dst), "l"(src),
               "r"(src_bytes), "l"(policy)
               : "memory");
}

MOEKERNELS_DEVICE void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's newest groups are in flight; other threads see the data after a
// barrier.
template <int kPending>
MOEKERNELS_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits until none of this thread's cp.async is under way, whatever else waits for them: before the thread exits.
MOEKERNELS_DEVICE void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// One arrival on the mbarrier once all earlier cp.async of this thread are done. It uses up one of the counted
// arrivals, and it does not cover ordinary stores.
MOEKERNELS_DEVICE void cp_async_mbarrier_arrive_noinc(uint32_t mbarrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(mbarrier) : "memory");
}

// ---- ldmatrix / stmatrix: four 8x8 matrices of 16-bit elements; lane 8i + r has the address of row r of matrix i ----

// registers[i] of lane l: row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1 of matrix i.
MOEKERNELS_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row_address)
               : "memory");
}

// registers[i] of lane l: column l / 4, rows 2 (l % 4) and 2 (l % 4) + 1 of matrix i.
MOEKERNELS_DEVICE void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row_address)
               : "memory");
}

// sm_90. The inverse of ldmatrix_x4.
MOEKERNELS_DEVICE void stmatrix_x4(uint32_t row_address, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(registers[0]),
               "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// ---- mma.sync: d += a b, one warp; g = lane / 4, q = lane % 4 ----
// d[i]: row g + 8 (i / 2), column 2q + i % 2.

// a: 16x16, a[i] holds row g + 8 (i % 2), k = 2q + 8 (i / 2) and the next; b: 16x8, b_i holds k = 2q + 8i and the next,
// column g. T: __nv_bfloat16 or __half.
template <class T>
MOEKERNELS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
MOEKERNELS_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
MOEKERNELS_DEVICE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a: 16x8, a[i] holds row g + 8 (i % 2), k = q + 4 (i / 2); b: 8x8, b_i holds k = q + 4i, column g. Round operands with
// cvt_rna_tf32 first: the instruction ignores the low 13 bits.
MOEKERNELS_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To the nearest tf32, ties away from zero.
MOEKERNELS_DEVICE uint32_t cvt_rna_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// ---- mbarrier: 8 bytes of shared memory, 8-byte aligned ----
// A phase ends when the counted arrivals are in and the expected bytes have landed; then the parity flips.

// By one thread, then fence_mbarrier_init and __syncthreads() before anyone else uses it.
MOEKERNELS_DEVICE void mbarrier_init(uint32_t mbarrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}

MOEKERNELS_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Before the memory of an mbarrier serves another purpose.
MOEKERNELS_DEVICE void mbarrier_inval(uint32_t mbarrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(mbarrier) : "memory");
}

MOEKERNELS_DEVICE void mbarrier_arrive(uint32_t mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}

MOEKERNELS_DEVICE void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}

MOEKERNELS_DEVICE void mbarrier_expect_tx(uint32_t mbarrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}

// True once the phase of this parity has ended; on a fresh barrier parity 1 has, parity 0 has not. May return early.
MOEKERNELS_DEVICE bool mbarrier_try_wait_parity(uint32_t mbarrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(mbarrier), "r"(parity)
               : "memory");
  return done != 0;
}

MOEKERNELS_DEVICE void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
  while (!mbarrier_try_wait_parity(mbarrier, parity)) {
  }
}

// ---- clusters (sm_90): blocks that run at the same time and reach into each other's shared memory ----

// This block's number in its cluster.
MOEKERNELS_DEVICE uint32_t cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address in the cluster of what lies at `address` in the block of that rank: for the `_cluster` forms alone.
MOEKERNELS_DEVICE uint32_t mapa(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Says that this block's asynchronous reads are done. It orders no ordinary accesses for the other block: that would be
// .release.cluster, a fence of the whole GPU each time.
MOEKERNELS_DEVICE void mbarrier_arrive_cluster(uint32_t cluster_address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address) : "memory");
}

// A barrier of all threads of the cluster that have not exited, in two halves: before the first access to another
// block's shared memory, and before a block ends that others may still reach into.
MOEKERNELS_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

MOEKERNELS_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- TMA and bulk copies (sm_90) ----

// Makes this thread's ordinary (generic proxy) accesses to shared memory, and those it has synchronised with, visible
// to the async proxy: needed between a st.shared, stmatrix or cp.async and a wgmma or bulk store that reads what it
// wrote.
MOEKERNELS_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

MOEKERNELS_DEVICE void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of the tensor into shared memory. x is the coordinate of the innermost dimension. Elements outside the tensor
// become zero, and count towards the mbarrier's expected bytes all the same. dst: aligned to the swizzle pattern (1024
// bytes with the 128-byte swizzle), at least 128. By one thread, with warp-uniform coordinates.
MOEKERNELS_DEVICE void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          dst),
      "l"(map), "r"(mbarrier), "r"(x), "r"(y)
      : "memory");
}

MOEKERNELS_DEVICE void tma_load_2d_hint(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x, int32_t y,
                                        uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
      "%4}], "
      "[%2], %5;" ::"r"(dst),
      "l"(map), "r"(mbarrier), "r"(x), "r"(y), "l"(policy)
      : "memory");
}

MOEKERNELS_DEVICE void tma_load_3d(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x, int32_t y,
                                   int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(dst),
      "l"(map), "r"(mbarrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

MOEKERNELS_DEVICE void tma_load_3d_hint(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x, int32_t y,
                                        int32_t z, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
      "l"(map), "r"(mbarrier), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

// tma_load_3d into the same place of every block of the cluster whose rank's bit is set in `ranks`; each block's own
// mbarrier, at the same address too, counts the bytes that land there.
MOEKERNELS_DEVICE void tma_load_3d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x,
                                             int32_t y, int32_t z, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
      "l"(map), "r"(mbarrier), "r"(x), "r"(y), "r"(z), "h"(ranks)
      : "memory");
}

// A box from shared memory into the tensor; what lies outside is not written. The writers of `src` fence_proxy_async
// and meet at a barrier first; bulk_wait_group_read before `src` is written again or the block ends.
MOEKERNELS_DEVICE void tma_store_2d(const CUtensorMap* map, uint32_t src, int32_t x, int32_t y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src),
               "r"(x), "r"(y)
               : "memory");
}

MOEKERNELS_DEVICE void tma_store_3d(const CUtensorMap* map, uint32_t src, int32_t x, int32_t y, int32_t z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(src),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Consecutive bytes, a multiple of 16; both sides 16-byte aligned.
MOEKERNELS_DEVICE void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(mbarrier)
               : "memory");
}

MOEKERNELS_DEVICE void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes)
               : "memory");
}

MOEKERNELS_DEVICE void bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most kPending groups of stores still read shared memory.
template <int kPending>
MOEKERNELS_DEVICE void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until at most kPending groups of stores are incomplete.
template <int kPending>
MOEKERNELS_DEVICE void bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- warps and barriers ----

// True in one lane, the same each time. All 32 lanes call it.
MOEKERNELS_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}

// Named barriers 1 .. 15 (0 is __syncthreads), `num_threads` in whole warps: sync waits for the barrier to fill, arrive
// only counts.
MOEKERNELS_DEVICE void bar_sync(uint32_t id, uint32_t num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

MOEKERNELS_DEVICE void bar_arrive(uint32_t id, uint32_t num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Registers per thread, 24 .. 256 in steps of 8, once per role and by whole warpgroups; needs __launch_bounds__(n, 1).
template <int kRegisters>
MOEKERNELS_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
MOEKERNELS_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Programmatic dependent launch: wait for the kernels before this one; let the next one start its prologue.
MOEKERNELS_DEVICE void griddepcontrol_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

MOEKERNELS_DEVICE void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace moekernels::ptx

#endif  // MOEKERNELS_SIMT
