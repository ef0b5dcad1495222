// What the sm_80 and float32 GEMMs share, those over rows and those over weights: a tile's way through a block.
//
//   1. A ring of kStages stages, each 64 bytes deep: wait for the oldest, meet at a barrier (which also says that
//      everyone is done with the stage read last), multiply the oldest into the accumulators and, meanwhile, start to
//      refill the one read last.
//   2. The accumulators pass through shared memory, 64 rows at a time as float32, over the now idle stages. Whatever
//      the multiplication's layout, the caller finds whole rows there.
//
// The operands of a tile are called rows (kTileM of them) and weights (128).
//
// A `Compute` multiplies (fma_compute.cuh, mma_compute.cuh). It has
//   Element, kTileM, kThreads, kBlocksPerSm; kWarpsM: warps along the rows, each with kTileM / kWarpsM consecutive rows
//   kRowsMajor, kWeightsMajor: how its operands lie, as tile_loader.cuh or as mn_major_loader.cuh brings them
//   clear(); multiply(rows_tile, weights_tile, load_next): one stage, by shared-memory addresses; it calls load_next()
//   once, where the copies of a later stage are best issued
//   store<kPass>(slab): of each warp's rows, the kRowsPerPass after kPass * kRowsPerPass, to slab rows
//   warp_m * kRowsPerPass and following.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/gemm/mn_major_loader.cuh"
#include "cuda/gemm/tile_loader.cuh"
#include "cuda/ptx/ptx.cuh"

namespace moekernels {

constexpr int kTiledN = 128;  // weight rows of a tile

// The slab: sums on their way to the epilogue. The padding keeps the fragments' stores free of bank conflicts.
constexpr int kSlabRows = 64;
constexpr int kSlabPitch = kTiledN + 8;

template <class Compute_, int kStages_, bool kAligned_>
struct TiledGemmTraits {
  using Compute = Compute_;
  using T = typename Compute::Element;
  static constexpr int kStages = kStages_;
  static constexpr bool kAligned = kAligned_;
  static constexpr bool kCoded = false;  // the weights come as codes, and are widened on their way
  static constexpr bool kTransposed = Compute::kWeightsMajor == Major::kMN;
  static constexpr int kTileM = Compute::kTileM;
  static constexpr bool kTables = kTileM == 64 || sizeof(T) == 2;  // the large tiles of float32 need all registers
  static constexpr int kThreads = Compute::kThreads;
  static constexpr int kTileK = kTileRowBytes / static_cast<int>(sizeof(T));

  static constexpr int kRowsBytes = kTileM * kTileRowBytes;
  static constexpr int kStageBytes = kRowsBytes + kTiledN * kTileRowBytes;
  static constexpr int kSmemBytes = kStages * kStageBytes;  // and the schedule

  // Where the operands of a step are.
  static __device__ __forceinline__ uint32_t rows_tile(uint32_t smem, int step) {
    return smem + step % kStages * kStageBytes;
  }
  static __device__ __forceinline__ uint32_t weights_tile(uint32_t smem, int step) {
    return rows_tile(smem, step) + kRowsBytes;
  }

  static constexpr int kRowsPerPass = kSlabRows / Compute::kWarpsM;
  static constexpr int kPasses = kTileM / kSlabRows;

  static_assert(kSlabRows * kSlabPitch * static_cast<int>(sizeof(float)) <= kSmemBytes);
  static_assert(kTileM % kSlabRows == 0 && kRowsPerPass * kPasses * Compute::kWarpsM == kTileM);
  static_assert(kStages >= 2);
};

// Pass kPass of the tile's accumulators and all after it: finish(row_of) deals with the sums in the slab, whose row i
// belongs to row row_of(i) of the tile. The passes are unrolled by recursion: accumulators are registers, so which of
// them a pass stores must be known when it is compiled.
template <class Traits, int kPass = 0, class Finish>
__device__ __forceinline__ void finish_passes(const typename Traits::Compute& compute, float* slab, Finish&& finish) {
  if constexpr (kPass < Traits::kPasses) {
    __syncthreads();  // all are done with what the slab overwrites
    compute.template store<kPass>(slab);
    __syncthreads();
    finish([](int slab_row) {
      constexpr int kRowsPerWarp = Traits::kTileM / Traits::Compute::kWarpsM;
      return slab_row / Traits::kRowsPerPass * kRowsPerWarp + kPass * Traits::kRowsPerPass +
             slab_row % Traits::kRowsPerPass;
    });
    finish_passes<Traits, kPass + 1>(compute, slab, finish);
  }
}

struct NothingToPrepare {
  __device__ __forceinline__ void operator()(int) const {}
};

// The ring: `load(step, stage)` starts to copy a step into the stage at that address. `prepare(step)` makes of what has
// been copied what is multiplied, a step ahead and between multiplications; it finds there what was loaded with the
// step before.
template <class Traits, class Load, class Prepare = NothingToPrepare>
__device__ __forceinline__ void multiply_steps(typename Traits::Compute& compute, uint32_t smem, int num_steps,
                                               Load&& load, Prepare&& prepare = {}) {
  constexpr int kStages = Traits::kStages;
  constexpr bool kPrepares = !std::is_same_v<std::remove_cvref_t<Prepare>, NothingToPrepare>;
  const auto start = [&](int step) {
    if (step < num_steps) load(step, Traits::rows_tile(smem, step));
    ptx::cp_async_commit_group();  // an empty group too: waiting counts groups
  };
  compute.clear();
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) start(step);
  if constexpr (kPrepares) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();
    if (num_steps > 0) prepare(0);
  }
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();
    compute.multiply(Traits::rows_tile(smem, step), Traits::weights_tile(smem, step), [&] {
      start(step + kStages - 1);
      if (kPrepares && step + 1 < num_steps) prepare(step + 1);
    });
  }
  ptx::cp_async_wait_group<0>();
}

}  // namespace moekernels
