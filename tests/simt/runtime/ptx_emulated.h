// The names of csrc/cuda/ptx, for kernels that run on the CPU.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "cuda_builtins.h"
#include "emulated.h"

#define MOEKERNELS_DEVICE inline

namespace moekernels::ptx {

using ::simt::bar_arrive;
using ::simt::bar_sync;
using ::simt::bulk_commit_group;
using ::simt::bulk_load;
using ::simt::bulk_store;
using ::simt::cluster_arrive;
using ::simt::cluster_ctarank;
using ::simt::cluster_wait;
using ::simt::cp_async_commit_group;
using ::simt::cp_async_mbarrier_arrive_noinc;
using ::simt::cp_async_wait_all;
using ::simt::elect_one;
using ::simt::fence_mbarrier_init;
using ::simt::fence_proxy_async;
using ::simt::griddepcontrol_wait;
using ::simt::mapa;
using ::simt::mbarrier_arrive;
using ::simt::mbarrier_arrive_cluster;
using ::simt::mbarrier_arrive_expect_tx;
using ::simt::mbarrier_expect_tx;
using ::simt::mbarrier_init;
using ::simt::mbarrier_inval;
using ::simt::mbarrier_try_wait_parity;
using ::simt::mbarrier_wait;
using ::simt::prefetch_tensormap;
using ::simt::smem_address;
using ::simt::stmatrix_x4;
using ::simt::wgmma_commit_group;
using ::simt::wgmma_fence;

inline uint4 ld_global_nc_v4_hint(const void* pointer, uint64_t) {
  uint4 v;
  ::simt::read_constant(pointer, &v, sizeof v);
  return v;
}
inline uint4 ld_global_v4_keep(const void* pointer) {
  uint4 v;
  ::simt::read_aligned(pointer, &v, sizeof v);
  return v;
}
inline uint4 ld_global_v4_if(const void* pointer, bool condition) {
  return condition ? ld_global_v4_keep(pointer) : uint4{};
}
inline void st_global_v4(void* pointer, const uint4& v) {
  ::simt::write_aligned(pointer, &v, sizeof v);
}
inline void st_global_cs_v4(void* pointer, const uint4& v) {
  ::simt::write_aligned(pointer, &v, sizeof v);
}
inline uint4 ld_shared_v4(uint32_t address) {
  uint4 v;
  ::simt::read_shared(address, &v, sizeof v);
  return v;
}
inline uint32_t ld_shared_u32(uint32_t address) {
  uint32_t v;
  ::simt::read_shared(address, &v, sizeof v);
  return v;
}
inline float2 ld_shared_v2(uint32_t address) {
  float2 v;
  ::simt::read_shared(address, &v, sizeof v);
  return v;
}
inline void st_shared_v4(uint32_t address, const uint4& v) {
  ::simt::write_shared(address, &v, sizeof v);
}

inline uint64_t createpolicy_evict_first() {
  return 0;
}
inline uint64_t createpolicy_evict_last() {
  return 0;
}
inline void prefetch_global_l2(const void*) {}

inline void cp_async_16(uint32_t dst, const void* src, uint32_t src_bytes = 16) {
  ::simt::cp_async(dst, src, src_bytes);
}
inline void cp_async_16_hint(uint32_t dst, const void* src, uint32_t src_bytes, uint64_t) {
  ::simt::cp_async(dst, src, src_bytes);
}
template <int kPending>
void cp_async_wait_group() {
  ::simt::cp_async_wait_group(kPending);
}

inline void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row_address) {
  ::simt::ldmatrix_x4(registers, row_address, false);
}
inline void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t row_address) {
  ::simt::ldmatrix_x4(registers, row_address, true);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  ::simt::mma(kHalf ? ::simt::Element::kFloat16 : ::simt::Element::kBFloat16, d, a, b0, b1);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ::simt::mma(::simt::Element::kTF32, d, a, b0, b1);
}
// Adding half of the last kept bit rounds the magnitude to nearest, ties away from zero.
inline uint32_t cvt_rna_tf32(float x) {
  const unsigned bits = __float_as_uint(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xFFFFE000u : bits;
}

inline void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x, int32_t y) {
  ::simt::tma_load(dst, map, mbarrier, {2, {x, y, 0}});
}
inline void tma_load_2d_hint(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x, int32_t y, uint64_t) {
  ::simt::tma_load(dst, map, mbarrier, {2, {x, y, 0}});
}
inline void tma_load_3d(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x, int32_t y, int32_t z) {
  ::simt::tma_load(dst, map, mbarrier, {3, {x, y, z}});
}
inline void tma_load_3d_hint(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x, int32_t y, int32_t z,
                             uint64_t) {
  ::simt::tma_load(dst, map, mbarrier, {3, {x, y, z}});
}
inline void tma_load_3d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, int32_t x, int32_t y,
                                  int32_t z, uint16_t ranks) {
  ::simt::tma_load_multicast(dst, map, mbarrier, {3, {x, y, z}}, ranks);
}
inline void tma_store_2d(const CUtensorMap* map, uint32_t src, int32_t x, int32_t y) {
  ::simt::tma_store(map, src, {2, {x, y, 0}});
}
inline void tma_store_3d(const CUtensorMap* map, uint32_t src, int32_t x, int32_t y, int32_t z) {
  ::simt::tma_store(map, src, {3, {x, y, z}});
}
// A store takes effect when its group is waited for, whichever way.
template <int kPending>
void bulk_wait_group_read() {
  ::simt::bulk_wait_group(kPending);
}
template <int kPending>
void bulk_wait_group() {
  ::simt::bulk_wait_group(kPending);
}

template <int kRegisters>
void setmaxnreg_inc() {
  ::simt::setmaxnreg(kRegisters, true);
}
template <int kRegisters>
void setmaxnreg_dec() {
  ::simt::setmaxnreg(kRegisters, false);
}
inline void griddepcontrol_launch_dependents() {}

template <int kPending>
void wgmma_wait_group() {
  static_assert(kPending >= 0 && kPending <= 7);
  ::simt::wgmma_wait_group(kPending);
}
template <int kCount>
void wgmma_keep(float (&)[kCount]) {}

template <class T, int kN, int kTransA = 0, int kTransB = 0>
void wgmma_m64k16(float (&d)[kN / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  static_assert(kN == 8 || kN == 16 || kN == 32 || kN == 64 || kN == 96 || kN == 128 || kN == 192 || kN == 256);
  ::simt::wgmma(kHalf, kN, kTransA != 0, kTransB != 0, d, desc_a, desc_b, accumulate);
}

}  // namespace moekernels::ptx
