// The weight gradient on Hopper: wgmma fed by a pipeline of asynchronous copies. bf16 and fp16, float32 sums.
//
// A block is persistent: it takes the tiles blockIdx.x, blockIdx.x + gridDim.x, ... A tile is kTileM columns of
// grad_rows times kTileN columns of rows, of one expert; K, the expert's rows, goes by in steps of kTileK. An
// expert's tiles are spread over the blocks, so that long experts and short ones are too.
//
//   warpgroup 2, the producer, fills a ring of kStages stages with blocks of 64 columns by kTileK rows, as they lie in
//   memory (M- and N-major), under the 128-byte swizzle: kTileM / 64 blocks of grad_rows, kTileN / 64 of rows. What
//   lies in order comes by TMA, which takes boxes from any row on; what is found through an index comes by cp.async, 16
//   bytes per thread at a time, and the index of a step is read while the step before it is on its way. warpgroups 0
//   and 1, the consumers, multiply one block of grad_rows each with all of rows, and store what comes out.
//
//   full[s]:  the stage is filled. Where there is TMA, one arrival of the thread that issues it (with the bytes to
//             expect); where there are cp.async, one of each producer thread when its own are done.
//   empty[s]: the stage may be overwritten. One arrival of each consumer warp, once its multiplications have read it:
//             while one step runs, the step before it is released.
//
// The last step of an expert mostly reaches into rows of the next one. The consumers clear these in both operands, meet
// at a named barrier and only then multiply. Ordinary stores and cp.async write through the generic proxy, wgmma reads
// through the async one, hence a proxy fence after the clearing and, where rows are gathered, behind each wait.
#pragma once

#include <algorithm>

#include "common/rounding.h"
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/overlap.cuh"
#include "cuda/gemm/tensor_map_cache.cuh"
#include "cuda/gemm/warp_specialized.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/weight_grad/grouped_weight_grad.cuh"

namespace moekernels {

template <class ElementType, int kRowsColumns>
struct WeightGradSm90Traits {
  using T = ElementType;
  static constexpr int kTileM = 128;
  static constexpr int kTileN = kRowsColumns;
  static constexpr int kTileK = 64;
  static constexpr int kStages = kTileN == 256 ? 4 : 6;

  static constexpr int kConsumerWarps = 8;
  static constexpr int kConsumerThreads = 32 * kConsumerWarps;
  static constexpr int kProducerThreads = 128;
  static constexpr int kThreads = kConsumerThreads + kProducerThreads;
  // What the launch gives each of the 384 threads is 168.
  static constexpr int kProducerRegisters = 72;
  static constexpr int kConsumerRegisters = 216;
  static constexpr uint32_t kConsumerBarrier = 1;

  // Shared memory, in order; a swizzled block starts on 1024.
  static constexpr int kBlockColumns = 64;
  static constexpr uint32_t kBlockBytes = kTileK * kBlockColumns * sizeof(T);
  static constexpr uint32_t kABytes = kTileM / kBlockColumns * kBlockBytes;  // grad_rows
  static constexpr uint32_t kBBytes = kTileN / kBlockColumns * kBlockBytes;  // rows
  static constexpr uint32_t kBOffset = kStages * kABytes;
  static constexpr uint32_t kSlabOffset = kBOffset + kStages * kBBytes;
  static constexpr uint32_t kFullOffset = kSlabOffset + kConsumerWarps * kWarpSlabBytes;
  static constexpr uint32_t kEmptyOffset = kFullOffset + kStages * sizeof(uint64_t);
  static constexpr uint32_t kSmemBytes = kEmptyOffset + kStages * sizeof(uint64_t);

  static_assert(sizeof(T) == 2);
  static_assert(kTileM == 2 * kBlockColumns, "a block for each consumer");
  static_assert(kTileN == 128 || kTileN == 256);
  static_assert(kProducerThreads * kProducerRegisters + kConsumerThreads * kConsumerRegisters <= kThreads * 168);
  static constexpr uint32_t kLaunchSmemBytes = kSmemBytes + ptx::kSwizzleAlignment;
  static_assert(kLaunchSmemBytes <= 227 * 1024);
};

// ---- the producer ----

// One thread's share of an operand that is gathered: chunk `thread % 8` of every 16th row of each block.
template <class Traits, int kColumns>
class DepthGather {
  using T = typename Traits::T;

 public:
  __device__ __forceinline__ DepthGather(const RaggedRows& from, const void* readable, int thread)
      : from_(from), readable_(readable), chunk_(thread % 8), thread_row_(thread / 8) {}

  __device__ __forceinline__ void start_tile(const RowRange& rows, int32_t first_column) {
    column_ = first_column + chunk_ * kVec;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int32_t left = from_.width - (column_ + block * Traits::kBlockColumns);
      bytes_[block] = static_cast<uint32_t>(min(max(left, 0), kVec)) * sizeof(T);
    }
    row_ = rows.begin + thread_row_;
    end_ = rows.end;
    find_rows();
  }

  // The next step, to the blocks that start at `dst`.
  __device__ __forceinline__ void copy_step(uint32_t dst) {
    const uint32_t place = dst + swizzle_128(thread_row_, chunk_);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool is_row = source_[i] >= 0;
      const T* const row = static_cast<const T*>(from_.data) + source_[i] * from_.stride + column_;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        // Nothing is read where there are no bytes, but the address has to be one of something.
        const uint32_t bytes = is_row ? bytes_[block] : 0;
        const void* const src = bytes > 0 ? row + block * Traits::kBlockColumns : readable_;
        ptx::cp_async_16(place + block * Traits::kBlockBytes + i * kRowStep * 128, src, bytes);
      }
    }
    row_ += Traits::kTileK;
    find_rows();
  }

 private:
  static constexpr int kVec = Vec16<T>::kSize;
  static constexpr int kBlocks = kColumns / Traits::kBlockColumns;
  static constexpr int kRowStep = Traits::kProducerThreads / 8;  // a multiple of 8: one swizzle for all rows
  static constexpr int kRows = Traits::kTileK / kRowStep;

  __device__ __forceinline__ void find_rows() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) source_[i] = source_row_before(end_, from_, row_ + kRowStep * i);
  }

  RaggedRows from_;
  const void* readable_;
  int chunk_;
  int thread_row_;
  int32_t column_;           // the first of this tile that this thread copies,
  uint32_t bytes_[kBlocks];  // and what there is of its chunk in each block
  int32_t row_;              // this thread's first of the next step
  int32_t end_;
  int32_t source_[kRows];  // of the next step
};

template <class Traits>
__device__ __forceinline__ int32_t num_k_steps(const RowRange& rows) {
  return ceil_div(rows.end - rows.begin, Traits::kTileK);
}

template <class Traits>
__device__ __forceinline__ void produce_weight_grad(const CUtensorMap* grad_map, const CUtensorMap* rows_map,
                                                    const GroupedWeightGradParams& p, uint32_t smem, int warp) {
  const bool gathers_a = p.grad_token_of_row != nullptr;
  const bool gathers_b = p.token_of_row != nullptr;
  const bool issues_tma = warp == Traits::kConsumerWarps && !(gathers_a && gathers_b);
  if (!gathers_a && !gathers_b && !issues_tma) return;

  const WeightTiles tiles(p, Traits::kTileM, Traits::kTileN);
  const auto num_tiles = static_cast<int32_t>(tiles.count());
  const uint32_t tma_bytes = (gathers_a ? 0 : Traits::kABytes) + (gathers_b ? 0 : Traits::kBBytes);
  const auto load_blocks = [](uint32_t dst, const CUtensorMap* map, uint32_t full, int32_t column, int32_t row,
                              int num_blocks) {
#pragma unroll
    for (int block = 0; block < num_blocks; ++block) {
      ptx::tma_load_3d(dst + block * Traits::kBlockBytes, map, full, column + block * Traits::kBlockColumns, row, 0);
    }
  };
  const int thread = static_cast<int>(threadIdx.x) - Traits::kConsumerThreads;
  DepthGather<Traits, Traits::kTileM> gather_a(ragged_grad_rows(p), any_address(p), thread);
  DepthGather<Traits, Traits::kTileN> gather_b(ragged_rows(p), any_address(p), thread);
  Pipeline<Traits> pipeline(smem);
  for (auto index = static_cast<int32_t>(blockIdx.x); index < num_tiles; index += gridDim.x) {
    const WeightTile tile = tiles.tile(index);
    const RowRange rows = expert_rows(p.expert_offsets, tile.expert, p.num_rows);
    // The coordinates of a TMA are the warp's: the shuffle tells the compiler.
    const int32_t row_begin = __shfl_sync(0xFFFFFFFF, rows.begin, 0);
    const int32_t num_steps = __shfl_sync(0xFFFFFFFF, num_k_steps<Traits>(rows), 0);
    if (gathers_a) gather_a.start_tile(rows, tile.row);
    if (gathers_b) gather_b.start_tile(rows, tile.col);
    for (int32_t step = 0; step < num_steps; ++step) {
      pipeline.wait_empty();
      if (issues_tma && ptx::elect_one()) {
        const int32_t row = row_begin + step * Traits::kTileK;
        ptx::mbarrier_arrive_expect_tx(pipeline.full(), tma_bytes);
        if (!gathers_a) {
          load_blocks(pipeline.a(), grad_map, pipeline.full(), tile.row, row, Traits::kTileM / Traits::kBlockColumns);
        }
        if (!gathers_b) {
          load_blocks(pipeline.b(), rows_map, pipeline.full(), tile.col, row, Traits::kTileN / Traits::kBlockColumns);
        }
      }
      if (gathers_a) gather_a.copy_step(pipeline.a());
      if (gathers_b) gather_b.copy_step(pipeline.b());
      if (gathers_a || gathers_b) ptx::cp_async_mbarrier_arrive_noinc(pipeline.full());
      pipeline.advance();
    }
  }
  if (gathers_a || gathers_b) ptx::cp_async_wait_all();  // a thread does not exit with copies of its own under way
}

// ---- the consumers ----

// Zeros to rows [first_row, kTileK) of every block of a stage, by all consumers together.
template <class Traits>
__device__ __forceinline__ void clear_rows(const Pipeline<Traits>& stage, int32_t first_row) {
  constexpr int kRowChunks = Traits::kBlockColumns * sizeof(typename Traits::T) / 16;
  const auto first = static_cast<uint32_t>(first_row * kRowChunks) + threadIdx.x;
  for (uint32_t chunk = first; chunk < Traits::kTileK * kRowChunks; chunk += Traits::kConsumerThreads) {
#pragma unroll
    for (uint32_t block = 0; block < Traits::kABytes; block += Traits::kBlockBytes) {
      ptx::st_shared_v4(stage.a() + block + chunk * 16, uint4{0, 0, 0, 0});
    }
#pragma unroll
    for (uint32_t block = 0; block < Traits::kBBytes; block += Traits::kBlockBytes) {
      ptx::st_shared_v4(stage.b() + block + chunk * 16, uint4{0, 0, 0, 0});
    }
  }
  ptx::fence_proxy_async();
  ptx::bar_sync(Traits::kConsumerBarrier, Traits::kConsumerThreads);
}

template <class Traits>
__device__ __forceinline__ void consume_weight_grad(const GroupedWeightGradParams& p, uint32_t smem, int warp,
                                                    int lane) {
  using T = typename Traits::T;
  constexpr int kWgmmaK = 16;
  const bool gathers = p.grad_token_of_row != nullptr || p.token_of_row != nullptr;
  const uint32_t block = warp / 4 * Traits::kBlockBytes;  // of grad_rows, for this warpgroup
  const WeightTiles tiles(p, Traits::kTileM, Traits::kTileN);
  const auto num_tiles = static_cast<int32_t>(tiles.count());
  const auto release = [lane](const Pipeline<Traits>& stage) {
    if (lane == 0) ptx::mbarrier_arrive(stage.empty());
  };

  float acc[Traits::kTileN / 2];
  Pipeline<Traits> pipeline(smem);
  for (auto index = static_cast<int32_t>(blockIdx.x); index < num_tiles; index += gridDim.x) {
    const WeightTile tile = tiles.tile(index);
    const RowRange rows = expert_rows(p.expert_offsets, tile.expert, p.num_rows);
    const int32_t num_steps = num_k_steps<Traits>(rows);
    const WarpRows<T> out{static_cast<T*>(p.grad_weight) + tile.expert * p.out_features * p.in_features,
                          tile.row + 16 * warp, static_cast<int32_t>(p.out_features),
                          static_cast<int32_t>(p.in_features)};
    if (num_steps == 0) {
      store_zeros<Traits::kTileN>(out, tile.col, lane);
      continue;
    }
    Pipeline<Traits> previous = pipeline;
    for (int32_t step = 0; step < num_steps; ++step) {
      pipeline.wait_full();
      if (gathers) ptx::fence_proxy_async();
      const int32_t left = rows.end - rows.begin - step * Traits::kTileK;
      if (left < Traits::kTileK) clear_rows(pipeline, left);
      const uint64_t a = ptx::wgmma_descriptor(pipeline.a() + block, Traits::kBlockBytes, 1024, ptx::Swizzle::k128B);
      const uint64_t b = ptx::wgmma_descriptor(pipeline.b(), Traits::kBlockBytes, 1024, ptx::Swizzle::k128B);
      ptx::wgmma_keep(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < Traits::kTileK / kWgmmaK; ++k) {  // 16 rows of 128 bytes each
        ptx::wgmma_m64k16<T, Traits::kTileN, 1, 1>(acc, a + 128 * k, b + 128 * k, step + k > 0);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_keep(acc);
      ptx::wgmma_wait_group<1>();
      if (step > 0) release(previous);
      previous = pipeline;
      pipeline.advance();
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_keep(acc);
    release(previous);

    store_rows<Traits::kTileN>(acc, out, tile.col, smem + Traits::kSlabOffset + warp * kWarpSlabBytes, lane);
  }
}

// ---- the kernel ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    grouped_weight_grad_sm90_kernel(const __grid_constant__ CUtensorMap grad_map,  // each unused where its rows are
                                    const __grid_constant__ CUtensorMap rows_map,  // gathered
                                    const __grid_constant__ GroupedWeightGradParams params) {
#if MOEKERNELS_SM90A
  MOEKERNELS_DYNAMIC_SMEM(given);
  const uint32_t smem = ptx::smem_address(ptx::align_for_swizzle(given));
  const int warp = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;

  if (warp == 0 && lane == 0) {
    const bool gathers_a = params.grad_token_of_row != nullptr;
    const bool gathers_b = params.token_of_row != nullptr;
    const uint32_t arrivals =
        (gathers_a && gathers_b ? 0 : 1) + (gathers_a || gathers_b ? Traits::kProducerThreads : 0);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      ptx::mbarrier_init(smem + Traits::kFullOffset + stage * 8, arrivals);
      ptx::mbarrier_init(smem + Traits::kEmptyOffset + stage * 8, Traits::kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
    if (!gathers_a) ptx::prefetch_tensormap(&grad_map);
    if (!gathers_b) ptx::prefetch_tensormap(&rows_map);
  }
  begin_overlapped();
  __syncthreads();
  if (warp >= Traits::kConsumerWarps) {
    ptx::setmaxnreg_dec<Traits::kProducerRegisters>();
    produce_weight_grad<Traits>(&grad_map, &rows_map, params, smem, warp);
  } else {
    ptx::setmaxnreg_inc<Traits::kConsumerRegisters>();
    consume_weight_grad<Traits>(params, smem, warp, lane);
  }
#else
  __trap();  // never launched: launch_grouped_weight_grad_sm90 leaves such builds to another path
#endif
}

template <class Traits>
cudaError_t launch_weight_grad_sm90(const GroupedWeightGradParams& params, const TileConfig& config,
                                    const CUtensorMap& grad_map, const CUtensorMap& rows_map, cudaStream_t stream) {
  if (config.tile_m != Traits::kTileM || config.tile_k != Traits::kTileK || config.stages != Traits::kStages) {
    return cudaErrorInvalidValue;
  }
  DeviceInfo device{};
  if (const cudaError_t error = device_info(&device); error != cudaSuccess) return error;
  const int64_t tiles = WeightTiles(params, Traits::kTileM, Traits::kTileN).count();
  if (tiles > INT32_MAX - device.sm_count) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, device.sm_count));
  constexpr auto kKernel = grouped_weight_grad_sm90_kernel<Traits>;
  LaunchConfig launch_config{dim3(blocks), dim3(Traits::kThreads), Traits::kLaunchSmemBytes, stream};
  launch_config.overlap_previous = can_overlap_previous<kKernel>();
  return launch<kKernel>(launch_config, grad_map, rows_map, params);
}

#define MOEKERNELS_INSTANCE(T, tile_n)                                           \
  template cudaError_t launch_weight_grad_sm90<WeightGradSm90Traits<T, tile_n>>( \
      const GroupedWeightGradParams&, const TileConfig&, const CUtensorMap&, const CUtensorMap&, cudaStream_t)
extern MOEKERNELS_INSTANCE(__nv_bfloat16, 128);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, 256);
extern MOEKERNELS_INSTANCE(__half, 128);
extern MOEKERNELS_INSTANCE(__half, 256);

}  // namespace moekernels
