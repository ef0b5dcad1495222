// The grouped GEMM on Hopper: wgmma fed by a pipeline of asynchronous copies. bf16 and fp16, float32 sums.
//
// A block is persistent: it takes the tiles blockIdx.x, blockIdx.x + gridDim.x, ... of the schedule that scheduler.cuh
// makes from expert_offsets. A tile is kTileM rows of one expert by kTileN of its weight rows; gated, these are
// kTileN / 2 gate rows and the kTileN / 2 value rows that belong to them. K goes by in steps of kTileK.
//
//   warpgroup 2, the producer, fills a ring of kStages stages, each [kTileM, kTileK] of rows and [kTileN, kTileK] of
//   weights, K-major under the 128-byte swizzle. (A transposed weight [E, K, M] comes as it lies, N-major: blocks of 64
//   columns by kTileK rows, which wgmma reads as well.) Weights come by TMA. So do rows that lie in order; rows found
//   through token_of_row are copied by cp.async, 16 bytes per thread at a time. warpgroups 0 and 1, the consumers,
//   multiply 64 rows each with all weights of the stage, and store what comes out.
//
//   full[s]:  the stage is filled. One arrival of the thread that issues TMA (with the bytes to expect) and, where rows
//             are gathered, one of each producer thread when its cp.async are done.
//   empty[s]: the stage may be overwritten. One arrival of each consumer warp, once its multiplications have read it:
//             while one step runs, the step before it is released.
//
// cp.async writes through the generic proxy and wgmma reads through the async one: consumers of gathered rows put a
// proxy fence behind the wait for full[s], which costs little there, as the step before still runs. TMA needs none, nor
// does overwriting a stage that wgmma has read.
//
// In clusters of two the blocks take neighbouring tiles of rows of one expert, with the same weights: each loads half
// of every stage's weights, multicast into both. Then full[s] expects the bytes of both, and empty[s] the consumers of
// both, as whoever loads overwrites both. An expert's last tile may leave the second block without rows: it only helps.
//
// In turn, the consumers do not end a tile together, which would leave the tensor cores idle while both store. The
// second waits before the tile's last kTurnSteps until the first has issued its own: the first then stores while the
// second multiplies, and is ahead of it in the next tile while the second stores. The ring has more stages than that:
// the first needs none for these steps that the second has yet to release.
//
// What is stored goes through a slab of shared memory of the warp's own, 64 columns at a time, to leave in whole
// 16-byte pieces. Rows past the tile's last belong to the next expert and are masked there: in the multiplication they
// may hold anything, as no row of a product depends on another. A consumer without any row in the tile just releases
// the stages. Columns past the weight's last come as zeros (gated: the gate box may run on into values) and are masked.
#pragma once

#include <algorithm>

#include "common/rounding.h"
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/overlap.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/grouped_gemm.cuh"
#include "cuda/gemm/scheduler.cuh"
#include "cuda/gemm/tensor_map_cache.cuh"
#include "cuda/gemm/warp_specialized.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace moekernels {

template <class ElementType, int kWeightRows, bool kIsGated, bool kIsTransposed = false>
struct GroupedGemmSm90Traits {
  using T = ElementType;
  static constexpr bool kGated = kIsGated;
  static constexpr bool kTransposed = kIsTransposed;
  static constexpr int kTileM = 128;
  static constexpr int kTileN = kWeightRows;
  static constexpr int kTileK = 64;
  static constexpr int kOutN = kGated ? kTileN / 2 : kTileN;  // output columns of a tile
  static constexpr int kStages = kTileN == 256 ? 4 : 6;
  static constexpr int kTurnSteps = 3;

  static constexpr int kConsumerWarps = 8;
  static constexpr int kConsumerThreads = 32 * kConsumerWarps;
  static constexpr int kProducerThreads = 128;
  static constexpr int kThreads = kConsumerThreads + kProducerThreads;
  static constexpr uint32_t kTurnBarrier = 1;
  // What the launch gives each of the 384 threads is 168.
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;

  // Shared memory, in order. All operand rows are 128 bytes, of K or, transposed, of 64 columns; a swizzled tile starts
  // on 1024.
  static constexpr uint32_t kOperandRowBytes = kTileK * sizeof(T);
  static constexpr uint32_t kABytes = kTileM * kOperandRowBytes;
  static constexpr int kRowBox = 64;  // rows of one TMA, and of one consumer
  static constexpr uint32_t kRowBoxBytes = kRowBox * kOperandRowBytes;
  static constexpr uint32_t kBBytes = kTileN * kOperandRowBytes;
  static constexpr int kBlockColumns = 64;  // of a transposed weight
  static constexpr uint32_t kBlockBytes = kTileK * kOperandRowBytes;
  static constexpr uint32_t kSlabBytes = kConsumerWarps * kWarpSlabBytes;
  static constexpr uint32_t kBOffset = kStages * kABytes;
  static constexpr uint32_t kSlabOffset = kBOffset + kStages * kBBytes;
  static constexpr uint32_t kFullOffset = kSlabOffset + kSlabBytes;
  static constexpr uint32_t kEmptyOffset = kFullOffset + kStages * sizeof(uint64_t);
  static constexpr uint32_t kScheduleOffset = kEmptyOffset + kStages * sizeof(uint64_t);
  static constexpr uint32_t kSmemBytes = kScheduleOffset + TileSchedule::smem_bytes(kMaxExpertsPerLaunch);

  static_assert(sizeof(T) == 2 && kOperandRowBytes == 128);
  static_assert(kTileN == 128 || kTileN == 256);
  static_assert(kOutN % kSlabColumns == 0);
  static_assert(kTurnSteps < kStages);
  static_assert(!(kGated && kTransposed));
  static_assert(kProducerThreads * kProducerRegisters + kConsumerThreads * kConsumerRegisters <= kThreads * 168);
  static constexpr uint32_t kLaunchSmemBytes = kSmemBytes + ptx::kSwizzleAlignment;
  static_assert(kLaunchSmemBytes <= 227 * 1024);
};

// ---- the producer ----

// This block's share of a stage of weights: all of it or, in a pair, one half into both blocks. By one thread.
template <class Traits>
__device__ __forceinline__ void load_weights(const CUtensorMap* map, const GroupedGemmParams& p,
                                             const Pipeline<Traits>& pipeline, const ClusterPlace& place,
                                             int32_t expert, int32_t column, int32_t k) {
  // Halves of a stage: gates and values, or the first and the last columns.
  const int32_t second = Traits::kGated ? static_cast<int32_t>(p.out_features / 2) : Traits::kTileN / 2;
  constexpr uint32_t kHalfBytes = Traits::kBBytes / 2;
  constexpr int kHalfBlocks = Traits::kTileN / 2 / Traits::kBlockColumns;
  const auto load_half = [&](uint32_t half, auto&& load_box) {
    const uint32_t to = pipeline.b() + half * kHalfBytes;
    const int32_t from = column + static_cast<int32_t>(half) * second;
    if constexpr (Traits::kTransposed) {
#pragma unroll
      for (int block = 0; block < kHalfBlocks; ++block) {
        load_box(to + block * Traits::kBlockBytes, from + block * Traits::kBlockColumns, k);
      }
    } else {
      load_box(to, k, from);
    }
  };
  if (place.size == 1) {
    const auto load_box = [&](uint32_t to, int32_t x, int32_t y) {
      ptx::tma_load_3d(to, map, pipeline.full(), x, y, expert);
    };
    load_half(0, load_box);
    load_half(1, load_box);
  } else {
    load_half(place.rank, [&](uint32_t to, int32_t x, int32_t y) {
      ptx::tma_load_3d_multicast(to, map, pipeline.full(), x, y, expert, 3);
    });
  }
}

// One thread's share of a stage of gathered rows: chunk `thread % 8` of every 16th row.
template <class Traits>
class RowGather {
 public:
  __device__ __forceinline__ RowGather(const GroupedGemmParams& p, int thread) : params_(p), chunk_(thread % 8) {
    first_row_ = thread / 8;
    place_ = swizzle_128(first_row_, chunk_);
  }

  __device__ __forceinline__ void start_tile(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t row = tile.row_begin + first_row_ + kRowStep * i;
      source_[i] = row < tile.row_end ? source_row(params_, row) : -1;
    }
  }

  __device__ __forceinline__ void copy_step(int step, uint32_t dst) const {
    using T = typename Traits::T;
    constexpr int kChunk = 16 / sizeof(T);
    const int64_t column = step * Traits::kTileK + chunk_ * kChunk;
    const int64_t left = params_.in_features - column;
    const uint32_t bytes = left <= 0 ? 0 : static_cast<uint32_t>(min(left, int64_t{kChunk})) * sizeof(T);
    const T* const rows = static_cast<const T*>(params_.rows) + column;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool valid = source_[i] >= 0 && bytes > 0;
      // Nothing is read where nothing is valid, but the address has to be one of something.
      const void* const src = valid ? rows + source_[i] * params_.row_stride : params_.weight;
      ptx::cp_async_16(dst + place_ + i * kRowStep * Traits::kOperandRowBytes, src, valid ? bytes : 0);
    }
  }

 private:
  static constexpr int kRowStep = Traits::kProducerThreads / 8;  // a multiple of 8: one swizzle for all rows
  static constexpr int kRows = Traits::kTileM / kRowStep;

  const GroupedGemmParams& params_;
  int chunk_;
  int first_row_;
  uint32_t place_;
  int32_t source_[kRows];
};

template <class Traits>
__device__ __forceinline__ void produce(const CUtensorMap* weight_map, const CUtensorMap* rows_map,
                                        const GroupedGemmParams& p, const TileSchedule& schedule,
                                        const ClusterPlace& place, uint32_t smem, int warp) {
  const bool gathered = p.token_of_row != nullptr;
  const bool issues_tma = warp == Traits::kConsumerWarps;
  if (!gathered && !issues_tma) return;

  const int32_t num_steps = static_cast<int32_t>(ceil_div(p.in_features, Traits::kTileK));
  const int32_t num_tiles = schedule.num_tiles();
  Pipeline<Traits> pipeline(smem);
  RowGather<Traits> gather(p, static_cast<int>(threadIdx.x) - Traits::kConsumerThreads);
  for (int32_t index = place.first_tile(); index < num_tiles; index += place.tile_stride()) {
    const Tile tile = place.own_rows(schedule.tile(index), Traits::kTileM);
    // The coordinates of a TMA are the warp's: the shuffle tells the compiler.
    const int32_t expert = __shfl_sync(0xFFFFFFFF, tile.expert, 0);
    const int32_t row = __shfl_sync(0xFFFFFFFF, tile.row_begin, 0);
    const int32_t column = __shfl_sync(0xFFFFFFFF, tile.col_tile, 0) * Traits::kOutN;
    const bool two_boxes = __shfl_sync(0xFFFFFFFF, tile.row_end - row > Traits::kRowBox, 0);
    const uint32_t row_bytes = gathered ? 0 : Traits::kRowBoxBytes * (two_boxes ? 2 : 1);
    if (gathered) gather.start_tile(tile);
    for (int32_t step = 0; step < num_steps; ++step) {
      pipeline.wait_empty();
      if (issues_tma && ptx::elect_one()) {
        const int32_t k = step * Traits::kTileK;
        ptx::mbarrier_arrive_expect_tx(pipeline.full(), Traits::kBBytes + row_bytes);
        load_weights<Traits>(weight_map, p, pipeline, place, expert, column, k);
        if (!gathered) ptx::tma_load_3d(pipeline.a(), rows_map, pipeline.full(), k, row, 0);
        if (!gathered && two_boxes) {
          ptx::tma_load_3d(pipeline.a() + Traits::kRowBoxBytes, rows_map, pipeline.full(), k, row + Traits::kRowBox, 0);
        }
      }
      if (gathered) {
        gather.copy_step(step, pipeline.a());
        ptx::cp_async_mbarrier_arrive_noinc(pipeline.full());
      }
      pipeline.advance();
    }
  }
  if (gathered) ptx::cp_async_wait_all();  // a thread does not exit with copies of its own under way
}

// ---- the consumers ----

// acc[i] of a lane, with g = lane / 4 and q = lane % 4: row g + 8 (i / 2 % 2) of the warp's 16, weight row
// 8 (i / 4) + 2q + i % 2 of the tile. Gated, acc[i] is a gate and acc[i + kTileN / 4] its value.

template <class Traits>
__device__ __forceinline__ void add_bias(float (&acc)[Traits::kTileN / 2], const GroupedGemmParams& p, const Tile& tile,
                                         int lane) {
  const Bias<typename Traits::T, false> bias(p, tile.expert);
  const auto width = static_cast<int32_t>(output_width(p));
  const int32_t lane_column = tile.col_tile * Traits::kOutN + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Traits::kTileN / 2; i += 4) {
    const int32_t column = lane_column + i * 2 % Traits::kOutN;
    const int32_t feature = column + (i * 2 < Traits::kOutN ? 0 : width);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float term = column + c < width ? bias[feature + c] : 0.0f;
      acc[i + c] += term;
      acc[i + 2 + c] += term;
    }
  }
}

// Sums become outputs before rounding: elements 0 .. kOutN / 2 - 1 of acc. One pass each, over registers, for what a
// problem asks for, so that the code of storing exists once. `row0`: the first of the warp's 16 rows.
template <class Traits>
__device__ __forceinline__ void finish_sums(float (&acc)[Traits::kTileN / 2], const GroupedGemmParams& p,
                                            const Tile& tile, int32_t row0, int lane) {
  if constexpr (!Traits::kTransposed) {
    if (p.bias != nullptr) add_bias<Traits>(acc, p, tile, lane);
    dispatch_activation(p.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < Traits::kOutN / 2; ++i) {
        acc[i] = activate<decltype(activation)::value>(acc[i]);
        if constexpr (Traits::kGated) acc[i] *= acc[Traits::kTileN / 4 + i];
      }
    });
  }
  if (p.row_scale != nullptr) {
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = row0 + lane / 4 + 8 * i;
      scale[i] = row < tile.row_end ? row_scale(p, row) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Traits::kOutN / 2; ++i) acc[i] *= scale[i / 2 % 2];
  }
}

template <class Traits>
__device__ __forceinline__ void consume(const GroupedGemmParams& p, const TileSchedule& schedule,
                                        const ClusterPlace& place, uint32_t smem, int warp, int lane, bool in_turn) {
  using T = typename Traits::T;
  constexpr int kWgmmaK = 16;
  const bool gathered = p.token_of_row != nullptr;
  const int warpgroup = warp / 4;
  const int32_t num_steps = static_cast<int32_t>(ceil_div(p.in_features, Traits::kTileK));
  const int32_t num_tiles = schedule.num_tiles();
  // In fewer steps the first consumer could end two tiles before the second has seen one of them end.
  const bool takes_turns = in_turn && num_steps >= Traits::kStages;
  const bool paired = place.size > 1;
  const uint32_t to_lanes_block = paired && lane < 2 ? ptx::mapa(smem, lane) - smem : 0;
  const auto release = [=](const Pipeline<Traits>& stage) {
    if (paired) {
      if (lane < 2) ptx::mbarrier_arrive_cluster(stage.empty() + to_lanes_block);
    } else if (lane == 0) {
      ptx::mbarrier_arrive(stage.empty());
    }
  };

  float acc[Traits::kTileN / 2];
  Pipeline<Traits> pipeline(smem);
  Tile tile{};
  int32_t index = place.first_tile();
  if (index < num_tiles) tile = place.own_rows(schedule.tile(index), Traits::kTileM);
  while (index < num_tiles) {
    const Tile current = tile;
    index += place.tile_stride();
    const bool idle = current.row_begin + Traits::kRowBox * warpgroup >= current.row_end;
    if (idle) {
      for (int32_t step = 0; step < num_steps; ++step) {
        pipeline.wait_full();
        __syncwarp();  // a lane that has yet to look would miss this phase once the stage is filled again
        release(pipeline);
        pipeline.advance();
      }
      if (index < num_tiles) tile = place.own_rows(schedule.tile(index), Traits::kTileM);
      continue;
    }

    // Where both have rows.
    const bool has_turns = takes_turns && current.row_begin + Traits::kRowBox < current.row_end;
    const int32_t wait_before = has_turns && warpgroup == 1 ? num_steps - Traits::kTurnSteps : -1;
    Pipeline<Traits> previous = pipeline;
    for (int32_t step = 0; step < num_steps; ++step) {
      if (step == wait_before) ptx::bar_sync(Traits::kTurnBarrier, Traits::kConsumerThreads);
      pipeline.wait_full();
      if (gathered) ptx::fence_proxy_async();
      const uint64_t rows =
          ptx::wgmma_descriptor(pipeline.a() + warpgroup * Traits::kRowBoxBytes, 16, 1024, ptx::Swizzle::k128B);
      const uint64_t weight = ptx::wgmma_descriptor(pipeline.b(), Traits::kTransposed ? Traits::kBlockBytes : 16, 1024,
                                                    ptx::Swizzle::k128B);
      ptx::wgmma_keep(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < Traits::kTileK / kWgmmaK; ++k) {
        // 16 elements of K: 32 bytes of each row or, transposed, 16 rows of 128 bytes.
        ptx::wgmma_m64k16<T, Traits::kTileN, 0, Traits::kTransposed ? 1 : 0>(
            acc, rows + 2 * k, weight + (Traits::kTransposed ? 128 : 2) * k, step + k > 0);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_keep(acc);
      ptx::wgmma_wait_group<1>();
      if (step > 0) release(previous);
      previous = pipeline;
      pipeline.advance();
    }
    if (has_turns && warpgroup == 0) ptx::bar_arrive(Traits::kTurnBarrier, Traits::kConsumerThreads);
    if (index < num_tiles) tile = place.own_rows(schedule.tile(index), Traits::kTileM);  // while the last step runs
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_keep(acc);
    release(previous);

    const int32_t row0 = current.row_begin + 16 * warp;
    finish_sums<Traits>(acc, p, current, row0, lane);
    const WarpRows<T> out{static_cast<T*>(p.out), row0, current.row_end, static_cast<int32_t>(output_width(p))};
    store_rows<Traits::kOutN>(acc, out, current.col_tile * Traits::kOutN,
                              smem + Traits::kSlabOffset + warp * kWarpSlabBytes, lane);
  }
  zero_unused_rows<T>(p, int64_t{blockIdx.x} * Traits::kConsumerThreads + threadIdx.x,
                      int64_t{gridDim.x} * Traits::kConsumerThreads);
}

// ---- the kernel ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    grouped_gemm_sm90_kernel(const __grid_constant__ CUtensorMap weight_map,
                             const __grid_constant__ CUtensorMap rows_map,  // unused where rows are gathered
                             const __grid_constant__ GroupedGemmParams params, int group_m, int cluster_size,
                             bool in_turn) {
#if MOEKERNELS_SM90A
  MOEKERNELS_DYNAMIC_SMEM(given);
  unsigned char* const raw = ptx::align_for_swizzle(given);
  const uint32_t smem = ptx::smem_address(raw);
  const int warp = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool gathered = params.token_of_row != nullptr;
  const ClusterPlace place{static_cast<uint32_t>(cluster_size), cluster_size > 1 ? ptx::cluster_ctarank() : 0};
  const int tile_rows = Traits::kTileM * cluster_size;

  if (warp == 1 && lane == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      ptx::mbarrier_init(smem + Traits::kFullOffset + stage * 8, 1 + (gathered ? Traits::kProducerThreads : 0));
      ptx::mbarrier_init(smem + Traits::kEmptyOffset + stage * 8, Traits::kConsumerWarps * cluster_size);
    }
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensormap(&weight_map);
    if (!gathered) ptx::prefetch_tensormap(&rows_map);
  }
  begin_overlapped();
  auto* const starts = reinterpret_cast<int32_t*>(raw + Traits::kScheduleOffset);
  if (warp == 0) {
    TileSchedule::build(starts, params.expert_offsets, params.num_experts, params.num_rows, tile_rows);
  }
  __syncthreads();
  if (place.size > 1) {  // the other block's barriers are ready, too
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }

  const auto col_tiles = static_cast<int>(ceil_div(output_width(params), Traits::kOutN));
  const TileSchedule schedule(starts, params.expert_offsets, params.num_experts, params.num_rows, tile_rows, col_tiles,
                              group_m);
  if (warp >= Traits::kConsumerWarps) {
    ptx::setmaxnreg_dec<Traits::kProducerRegisters>();
    produce<Traits>(&weight_map, &rows_map, params, schedule, place, smem, warp);
  } else {
    ptx::setmaxnreg_inc<Traits::kConsumerRegisters>();
    consume<Traits>(params, schedule, place, smem, warp, lane, in_turn);
  }
  if (place.size > 1) {  // the other block may still write here, or arrive
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
#else
  __trap();  // never launched: launch_grouped_gemm_sm90 leaves such builds to another path
#endif
}

template <class Traits>
cudaError_t launch_grouped_gemm_sm90(const GroupedGemmParams& params, const TileConfig& config,
                                     const CUtensorMap& weight_map, const CUtensorMap& rows_map, cudaStream_t stream) {
  if (config.tile_m != Traits::kTileM || config.tile_k != Traits::kTileK || config.stages != Traits::kStages ||
      config.group_m < 1 || config.cluster < 1 || config.cluster > 2) {
    return cudaErrorInvalidValue;
  }
  DeviceInfo device{};
  if (const cudaError_t error = device_info(&device); error != cudaSuccess) return error;
  const int64_t col_tiles = ceil_div(output_width(params), Traits::kOutN);
  // Tiles of a cluster, of which each block takes its part.
  const int64_t tiles = max_row_tiles(params.num_rows, params.num_experts, Traits::kTileM * config.cluster) * col_tiles;
  // A block counts one step past the last tile. K is counted in the tensor maps' 32 bits too.
  if (tiles > INT32_MAX - device.sm_count || params.in_features > INT32_MAX - Traits::kTileK) {
    return cudaErrorInvalidValue;
  }
  const int64_t clusters = std::min<int64_t>(tiles, std::max(device.sm_count / config.cluster, 1));
  const auto blocks = static_cast<unsigned>(clusters * config.cluster);
  constexpr auto kKernel = grouped_gemm_sm90_kernel<Traits>;
  LaunchConfig launch_config{dim3(blocks), dim3(Traits::kThreads), Traits::kLaunchSmemBytes, stream};
  launch_config.cluster = static_cast<unsigned>(config.cluster);
  launch_config.overlap_previous = can_overlap_previous<kKernel>();
  return launch<kKernel>(launch_config, weight_map, rows_map, params, std::max(config.group_m / config.cluster, 1),
                         config.cluster, config.in_turn);
}

#define MOEKERNELS_INSTANCE(T, tile_n, gated, transposed)                                             \
  template cudaError_t launch_grouped_gemm_sm90<GroupedGemmSm90Traits<T, tile_n, gated, transposed>>( \
      const GroupedGemmParams&, const TileConfig&, const CUtensorMap&, const CUtensorMap&, cudaStream_t)
extern MOEKERNELS_INSTANCE(__nv_bfloat16, 128, false, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, 256, false, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, 128, true, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, 256, true, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, 128, false, true);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, 256, false, true);
extern MOEKERNELS_INSTANCE(__half, 128, false, false);
extern MOEKERNELS_INSTANCE(__half, 256, false, false);
extern MOEKERNELS_INSTANCE(__half, 128, true, false);
extern MOEKERNELS_INSTANCE(__half, 256, true, false);
extern MOEKERNELS_INSTANCE(__half, 128, false, true);
extern MOEKERNELS_INSTANCE(__half, 256, false, true);

}  // namespace moekernels
