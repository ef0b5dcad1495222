// What a kernel calls: the CUDA built-ins and the PTX instructions, as functions of the runtime.
// cuda_builtins.h and ptx_emulated.h give them the names that kernels know.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace simt {

// ---- warp.cpp ----

enum class Shuffle { kIndex, kUp, kDown, kXor };
enum class Reduce { kAdd, kMin, kMax, kSignedMin, kSignedMax, kAnd, kOr, kXor };

uint3 thread_index() __attribute__((const));  // a fiber stays the thread it is
uint3 block_index() __attribute__((const));
dim3 block_shape() __attribute__((const));
dim3 grid_shape() __attribute__((const));
void syncwarp(uint32_t mask);
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand, int width);
uint32_t ballot(uint32_t mask, bool predicate);
uint32_t match_any(uint32_t mask, uint64_t value);
uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value);
bool elect_one();

// ---- barriers.cpp ----

uint64_t syncthreads(bool predicate, int result);  // result: 0 how many held, 1 whether all did, 2 whether any did
void bar_sync(uint32_t id, uint32_t num_threads);
void bar_arrive(uint32_t id, uint32_t num_threads);
void setmaxnreg(unsigned registers, bool increase);

void cluster_arrive();
void cluster_wait();
uint32_t cluster_ctarank();

// ---- mbarrier.cpp ----

// An address in the shared memory of the cluster: the offset, and above it one more than the block's rank.
constexpr uint32_t kClusterOffset = (1u << 24) - 1;
uint32_t mapa(uint32_t address, uint32_t rank);
void mbarrier_arrive_cluster(uint32_t cluster_address);

void mbarrier_init(uint32_t address, uint32_t arrivals);
void fence_mbarrier_init();
void mbarrier_inval(uint32_t address);
void mbarrier_expect_tx(uint32_t address, uint32_t bytes);
void mbarrier_arrive(uint32_t address);
void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes);
bool mbarrier_try_wait_parity(uint32_t address, uint32_t parity);
void mbarrier_wait(uint32_t address, uint32_t parity);

// ---- copies.cpp ----

void cp_async(uint32_t dst, const void* src, uint32_t src_bytes);
void cp_async_commit_group();
void cp_async_wait_group(size_t pending);
void cp_async_wait_all();
void cp_async_mbarrier_arrive_noinc(uint32_t mbarrier);

// ---- tma.cpp ----

struct Coordinates {
  int rank;
  int32_t at[3];
};

void fence_proxy_async();
void prefetch_tensormap(const CUtensorMap* map);
void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, const Coordinates& box);
void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t mbarrier, const Coordinates& box,
                        uint32_t ranks);
void tma_store(const CUtensorMap* map, uint32_t src, const Coordinates& box);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier);
void bulk_store(void* dst, uint32_t src, uint32_t bytes);
void bulk_commit_group();
void bulk_wait_group(size_t pending);

// ---- matrix.cpp ----

void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row_address, bool transposed);
void stmatrix_x4(uint32_t row_address, const uint32_t (&registers)[4]);
enum class Element { kBFloat16, kFloat16, kTF32 };
void mma(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// ---- wgmma.cpp ----

void wgmma_fence();
void wgmma_commit_group();
void wgmma_wait_group(size_t pending);
void wgmma(bool half, unsigned columns, bool transposed_a, bool transposed_b, float* d, uint64_t desc_a,
           uint64_t desc_b, bool accumulate);

// ---- scheduler.cpp ----

void griddepcontrol_wait();

// ---- accesses that are not plain loads and stores ----

uint32_t smem_address(const void* pointer);
void read_shared(uint32_t address, void* to, uint32_t bytes);
void write_shared(uint32_t address, const void* from, uint32_t bytes);
void read_aligned(const void* pointer, void* to, uint32_t bytes);   // fails unless `pointer` is a multiple of `bytes`
void read_constant(const void* pointer, void* to, uint32_t bytes);  // and unless it may change meanwhile
void write_aligned(void* pointer, const void* from, uint32_t bytes);
void before_atomic(const void* pointer, uint32_t bytes);
void copy_bytes(void* to, const void* from, uint32_t bytes);  // unchecked
void spin();                                                  // lets others run: __nanosleep
[[noreturn]] void trap(const char* what);

}  // namespace simt
