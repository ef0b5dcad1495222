// expert_ids [T, K] -> expert_offsets [E + 1], token_of_row [N], row_of_slot [T, K]
//
// Everything here is a stable counting sort: positions 0 .. n - 1 of a sequence, each with a bin, get consecutive rows
// by bin, and by position within a bin. Three sequences are sorted, the first two only where there is a capacity:
//
//   GroupOrder   the tokens of `token_order` by capacity group; only where there are several groups
//   ClaimOrder   the slots by expert, in the order in which they claim places: by group, choice, token. The i-th slot
//                of a group and expert is then among the first `capacity` if and only if the slot `capacity` rows
//                before it belongs to another group or expert, which RowOrder looks up.
//   RowOrder     the slots by expert, in (token, choice) order, without those that got no place: the result
//
// A block ranks a chunk of kChunk positions at a time (plan_ranks.cuh), and takes the bins kWindow at a time, so that
// its histograms fit into shared memory for any number of experts.
//
//   Few positions   one block sorts all sequences, one after the other, in one launch.
//   Many positions  two launches per sequence: blocks count the bins of a tile of the sequence each; then they add up
//                   what lies before their tile and give out rows. No block waits for another.
//
// Integers only, and no order that depends on timing: the same input always gives the same plan.
#include "common/rounding.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/overlap.cuh"
#include "cuda/routing/plan_ranks.cuh"
#include "cuda/routing/plan_sequences.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

// ---- few positions: one block ----

// All threads of the block; num_positions <= kChunk. Results are visible to the whole block on return.
template <class Traits, class Sequence>
__device__ __forceinline__ void sort_in_block(const Sequence& sequence, unsigned char* smem) {
  const int warp = threadIdx.x / kWarpSize;
  int32_t bin[Traits::kItems];
#pragma unroll
  for (int i = 0; i < Traits::kItems; ++i) {
    const int32_t p = position_in_chunk<Traits>(i);
    bin[i] = p < sequence.num_positions ? sequence.bin(p) : kNoBin;
    if (p < sequence.num_positions) sequence.prepare(p);
  }
  int32_t end = 0;
  for (int32_t first_bin = 0; first_bin < sequence.num_bins; first_bin += Traits::kWindow) {
    const int32_t rest = sequence.num_bins - first_bin;
    const int bins = rest < Traits::kWindow ? rest : Traits::kWindow;
    const SortMemory<Traits> memory(smem, bins);
    int32_t* histogram = memory.histograms + warp * bins;
    int32_t bin_in_window[Traits::kItems];
    int32_t rank[Traits::kItems];
#pragma unroll
    for (int i = 0; i < Traits::kItems; ++i) {
      bin_in_window[i] = bin[i] != kNoBin && is_index(bin[i] - first_bin, bins) ? bin[i] - first_bin : kNoBin;
    }
    rank_in_warp<Traits>(bin_in_window, histogram, bins, rank);
    __syncthreads();
    sum_histograms<Traits>(memory, bins);
    __syncthreads();
    if (warp == 0) sum_counts(memory.counts, memory.starts, bins, end);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Traits::kItems; ++i) {
      const int32_t b = bin_in_window[i];
      if (b != kNoBin) sequence.place(position_in_chunk<Traits>(i), memory.starts[b] + histogram[b] + rank[i]);
    }
    for (int b = threadIdx.x; b < bins; b += Traits::kThreads) sequence.start(first_bin + b, memory.starts[b]);
    end = memory.starts[bins];
    __syncthreads();
  }
  if (threadIdx.x == 0) sequence.start(sequence.num_bins, end);
#pragma unroll
  for (int i = 0; i < Traits::kItems; ++i) {
    const int32_t p = position_in_chunk<Traits>(i);
    if (p < sequence.num_positions && bin[i] == kNoBin) sequence.leave_out(p);
    if (p < sequence.num_positions && p >= end) sequence.past_end(p);
  }
  __syncthreads();
}

struct PlanSequences {
  GroupOrder groups;
  ClaimOrder claims;
  RowOrder rows;
  bool limited;  // by a capacity
  bool grouped;  // token_order has to be sorted by group
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) plan_in_block_kernel(PlanSequences sequences) {
  MOEKERNELS_DYNAMIC_SMEM(smem);
  begin_overlapped();
  if (sequences.grouped) sort_in_block<Traits>(sequences.groups, smem);
  if (sequences.limited) sort_in_block<Traits>(sequences.claims, smem);
  sort_in_block<Traits>(sequences.rows, smem);
}

template <class Traits>
cudaError_t launch_plan_in_block(const PlanSequences& sequences, cudaStream_t stream) {
  const int32_t groups = sequences.grouped ? sequences.groups.num_bins : 0;
  const int32_t most_bins = groups > sequences.rows.num_bins ? groups : sequences.rows.num_bins;
  LaunchConfig config{dim3(1), dim3(Traits::kThreads), SortMemory<Traits>::bytes(most_bins), stream};
  config.overlap_previous = can_overlap_previous<plan_in_block_kernel<Traits>>();
  return launch<plan_in_block_kernel<Traits>>(config, sequences);
}

// ---- many positions: one block per tile ----

struct Tiles {
  int32_t count;
  int32_t chunks;     // per tile
  int32_t* num_rows;  // [count, num_bins]: what each tile has of each bin
};

// The positions of the block's tile.
template <class Traits>
struct TileRange {
  int64_t begin;
  int64_t end;

  __device__ __forceinline__ TileRange(const Tiles& tiles, int32_t num_positions) {
    const int64_t size = static_cast<int64_t>(tiles.chunks) * Traits::kChunk;
    begin = blockIdx.x * size;
    end = begin + size < num_positions ? begin + size : num_positions;
  }
};

template <class Traits, class Sequence>
__global__ void __launch_bounds__(Traits::kThreads) plan_count_kernel(Sequence sequence, Tiles tiles) {
  MOEKERNELS_DYNAMIC_SMEM(smem);
  begin_overlapped();
  int32_t* counts = reinterpret_cast<int32_t*>(smem);  // [bins]
  int32_t* num_rows = tiles.num_rows + static_cast<int64_t>(blockIdx.x) * sequence.num_bins;
  const TileRange<Traits> tile(tiles, sequence.num_positions);
  const int lane = threadIdx.x % kWarpSize;

  for (int64_t p = tile.begin + threadIdx.x; p < tile.end; p += Traits::kThreads) {
    sequence.prepare(static_cast<int32_t>(p));
  }
  for (int32_t first_bin = 0; first_bin < sequence.num_bins; first_bin += Traits::kWindow) {
    const int32_t rest = sequence.num_bins - first_bin;
    const int bins = rest < Traits::kWindow ? rest : Traits::kWindow;
    for (int b = threadIdx.x; b < bins; b += Traits::kThreads) counts[b] = 0;
    __syncthreads();
    for (int64_t chunk = tile.begin; chunk < tile.end; chunk += Traits::kChunk) {
      int32_t bin[Traits::kItems];
#pragma unroll
      for (int i = 0; i < Traits::kItems; ++i) {
        const int64_t p = chunk + position_in_chunk<Traits>(i);
        const int32_t b = p < tile.end ? sequence.bin(static_cast<int32_t>(p)) : kNoBin;
        bin[i] = b != kNoBin && is_index(b - first_bin, bins) ? b - first_bin : kNoBin;
      }
#pragma unroll
      for (int i = 0; i < Traits::kItems; ++i) {
        const uint32_t peers = __match_any_sync(kFullWarp, bin[i]);
        if (bin[i] != kNoBin && lane == __ffs(static_cast<int>(peers)) - 1) atomicAdd(&counts[bin[i]], __popc(peers));
      }
    }
    __syncthreads();
    for (int b = threadIdx.x; b < bins; b += Traits::kThreads) num_rows[first_bin + b] = counts[b];
    __syncthreads();
  }
}

// counts[b] = the bin's rows in all tiles, before[b] = those in the tiles before the block's
template <class Traits>
__device__ __forceinline__ void sum_tiles(const Tiles& tiles, int32_t num_bins, int32_t first_bin, int bins,
                                          int32_t* counts, int32_t* before) {
  for (int b = threadIdx.x; b < bins; b += Traits::kThreads) counts[b] = before[b] = 0;
  __syncthreads();
  const int tile = static_cast<int>(blockIdx.x);
  for (int b = threadIdx.x % kWarpSize; b < bins; b += kWarpSize) {
    int32_t all = 0;
    int32_t earlier = 0;
#pragma unroll 4
    for (int t = threadIdx.x / kWarpSize; t < tiles.count; t += Traits::kWarps) {
      const int32_t rows = tiles.num_rows[static_cast<int64_t>(t) * num_bins + first_bin + b];
      all += rows;
      earlier += t < tile ? rows : 0;
    }
    atomicAdd(&counts[b], all);
    atomicAdd(&before[b], earlier);
  }
  __syncthreads();
}

template <class Traits, class Sequence>
__global__ void __launch_bounds__(Traits::kThreads) plan_place_kernel(Sequence sequence, Tiles tiles) {
  MOEKERNELS_DYNAMIC_SMEM(smem);
  begin_overlapped();
  const int warp = threadIdx.x / kWarpSize;
  const TileRange<Traits> tile(tiles, sequence.num_positions);
  int32_t end = 0;
  for (int32_t first_bin = 0; first_bin < sequence.num_bins; first_bin += Traits::kWindow) {
    const int32_t rest = sequence.num_bins - first_bin;
    const int bins = rest < Traits::kWindow ? rest : Traits::kWindow;
    const SortMemory<Traits> memory(smem, bins);
    int32_t* histogram = memory.histograms + warp * bins;
    int32_t* before = memory.histograms;  // until the first chunk is ranked

    sum_tiles<Traits>(tiles, sequence.num_bins, first_bin, bins, memory.counts, before);
    if (warp == 0) sum_counts(memory.counts, memory.starts, bins, end);
    __syncthreads();
    end = memory.starts[bins];
    for (int b = threadIdx.x; b < bins; b += Traits::kThreads) {
      if (blockIdx.x == 0) sequence.start(first_bin + b, memory.starts[b]);
      memory.starts[b] += before[b];
    }
    __syncthreads();

    for (int64_t chunk = tile.begin; chunk < tile.end; chunk += Traits::kChunk) {
      int32_t bin[Traits::kItems];
      int32_t rank[Traits::kItems];
#pragma unroll
      for (int i = 0; i < Traits::kItems; ++i) {
        const int64_t p = chunk + position_in_chunk<Traits>(i);
        const int32_t b = p < tile.end ? sequence.bin(static_cast<int32_t>(p)) : kNoBin;
        if (first_bin == 0 && p < tile.end && b == kNoBin) sequence.leave_out(static_cast<int32_t>(p));
        bin[i] = b != kNoBin && is_index(b - first_bin, bins) ? b - first_bin : kNoBin;
      }
      rank_in_warp<Traits>(bin, histogram, bins, rank);
      __syncthreads();
      sum_histograms<Traits>(memory, bins);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Traits::kItems; ++i) {
        const auto p = static_cast<int32_t>(chunk + position_in_chunk<Traits>(i));
        if (bin[i] != kNoBin) sequence.place(p, memory.starts[bin[i]] + histogram[bin[i]] + rank[i]);
      }
      __syncthreads();
      for (int b = threadIdx.x; b < bins; b += Traits::kThreads) memory.starts[b] += memory.counts[b];
    }
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) sequence.start(sequence.num_bins, end);
  for (int64_t row = tile.begin + threadIdx.x; row < tile.end; row += Traits::kThreads) {
    if (row >= end) sequence.past_end(static_cast<int32_t>(row));
  }
}

template <class Traits, class Sequence>
cudaError_t launch_plan_in_tiles(const Sequence& sequence, const Tiles& tiles, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tiles.count));
  const size_t bins = static_cast<size_t>(sequence.num_bins < Traits::kWindow ? sequence.num_bins : Traits::kWindow);
  LaunchConfig count_config{grid, dim3(Traits::kThreads), bins * sizeof(int32_t), stream};
  count_config.overlap_previous = can_overlap_previous<plan_count_kernel<Traits, Sequence>>();
  const cudaError_t error = launch<plan_count_kernel<Traits, Sequence>>(count_config, sequence, tiles);
  if (error != cudaSuccess) return error;
  LaunchConfig place_config{grid, dim3(Traits::kThreads), SortMemory<Traits>::bytes(sequence.num_bins), stream};
  place_config.overlap_previous = can_overlap_previous<plan_place_kernel<Traits, Sequence>>();
  return launch<plan_place_kernel<Traits, Sequence>>(place_config, sequence, tiles);
}

// ---- host ----

using SmallBlock = SortTraits<256, 4, 1024>;
using LargeBlock = SortTraits<1024, 4, 512>;
using TileBlock = SortTraits<512, 4, 1024>;

// How a plan is made, and where its scratch memory lies.
class PlanLayout {
 public:
  explicit PlanLayout(const PlanParams& params) {
    num_tokens_ = params.num_tokens > 0 ? params.num_tokens : 0;
    top_k_ = params.top_k > 0 ? params.top_k : 0;
    num_slots_ = num_tokens_ * top_k_;
    num_experts_ = params.num_experts > 0 ? params.num_experts : 0;
    group_size_ = params.group_size > 0 && params.group_size < num_tokens_ ? params.group_size : num_tokens_;
    if (group_size_ == 0) group_size_ = 1;
    num_groups_ = ceil_div(num_tokens_, group_size_);
    // A group has group_size * K slots, so that a capacity of as many drops nothing.
    limited_ = params.capacity >= 0 && params.capacity < group_size_ * top_k_ && num_slots_ <= INT32_MAX;
    grouped_ = limited_ && params.token_order != nullptr && num_groups_ > 1;
  }

  bool is_valid() const { return num_slots_ <= INT32_MAX; }
  bool in_block() const { return num_slots_ <= LargeBlock::kChunk; }
  int64_t num_slots() const { return num_slots_; }

  // Tiles of a sequence: fewer where there are so many bins that the tiles' counts would take more memory than this.
  Tiles tiles(int64_t num_positions, int64_t num_bins, int32_t* num_rows) const {
    constexpr int64_t kMaxTiles = 256;
    constexpr int64_t kMaxCounts = kMaxTiles * 1024;
    const int64_t chunks = ceil_div(num_positions, TileBlock::kChunk);
    const int64_t affordable = kMaxCounts / (num_bins > 0 ? num_bins : 1);
    int64_t count = chunks < kMaxTiles ? chunks : kMaxTiles;
    if (count > affordable) count = affordable > 1 ? affordable : 1;
    const int64_t per_tile = ceil_div(chunks, count);
    return {static_cast<int32_t>(ceil_div(chunks, per_tile)), static_cast<int32_t>(per_tile), num_rows};
  }

  int64_t workspace_bytes() const {
    return (claim_words() + order_words() + count_words()) * static_cast<int64_t>(sizeof(int32_t));
  }

  PlanSequences sequences(const PlanParams& params) const {
    auto* const workspace = static_cast<int32_t*>(params.workspace);
    int32_t* const slot_of_claim = limited_ ? workspace : nullptr;
    int32_t* const claim_of_slot = limited_ ? workspace + num_slots_ : nullptr;
    int32_t* const grouped_order = grouped_ ? workspace + claim_words() : nullptr;
    const auto num_tokens = static_cast<int32_t>(num_tokens_);
    const auto num_slots = static_cast<int32_t>(num_slots_);
    const auto num_experts = static_cast<int32_t>(num_experts_);
    const Slots slots{num_tokens, static_cast<int32_t>(top_k_), static_cast<int32_t>(group_size_)};
    PlanSequences result{};
    result.groups = {params.token_order, grouped_order, slots, num_tokens, static_cast<int32_t>(num_groups_)};
    result.claims = {params.expert_ids,
                     grouped_ ? grouped_order : params.token_order,
                     slot_of_claim,
                     claim_of_slot,
                     slots,
                     num_slots,
                     num_experts};
    result.rows = {params.expert_ids,
                   slot_of_claim,
                   claim_of_slot,
                   params.expert_offsets,
                   params.token_of_row,
                   params.row_of_slot,
                   limited_ ? static_cast<int32_t>(params.capacity) : 0,
                   slots,
                   num_slots,
                   num_experts};
    result.limited = limited_;
    result.grouped = grouped_;
    return result;
  }

  // Where the tiles' counts lie.
  int32_t* counts(const PlanParams& params) const {
    return static_cast<int32_t*>(params.workspace) + claim_words() + order_words();
  }

 private:
  int64_t claim_words() const { return limited_ ? 2 * num_slots_ : 0; }
  int64_t order_words() const { return grouped_ ? num_tokens_ : 0; }
  int64_t count_words() const {
    if (in_block()) return 0;
    const int64_t by_expert = tiles(num_slots_, num_experts_, nullptr).count * num_experts_;
    const int64_t by_group = grouped_ ? tiles(num_tokens_, num_groups_, nullptr).count * num_groups_ : 0;
    return by_expert > by_group ? by_expert : by_group;
  }

  int64_t num_tokens_;
  int64_t top_k_;
  int64_t num_slots_;
  int64_t num_experts_;
  int64_t group_size_;
  int64_t num_groups_;
  bool limited_;
  bool grouped_;
};

}  // namespace

int64_t workspace_bytes(const PlanParams& params) {
  return PlanLayout(params).workspace_bytes();
}

cudaError_t run(const PlanParams& params, cudaStream_t stream) {
  const PlanLayout layout(params);
  if (!layout.is_valid()) return cudaErrorInvalidValue;
  const PlanSequences sequences = layout.sequences(params);
  if (layout.num_slots() <= SmallBlock::kChunk) return launch_plan_in_block<SmallBlock>(sequences, stream);
  if (layout.in_block()) return launch_plan_in_block<LargeBlock>(sequences, stream);

  const auto sort = [&](const auto& sequence) {
    const Tiles tiles = layout.tiles(sequence.num_positions, sequence.num_bins, layout.counts(params));
    return launch_plan_in_tiles<TileBlock>(sequence, tiles, stream);
  };
  cudaError_t error = cudaSuccess;
  if (sequences.grouped) error = sort(sequences.groups);
  if (sequences.limited && error == cudaSuccess) error = sort(sequences.claims);
  return error == cudaSuccess ? sort(sequences.rows) : error;
}

}  // namespace moekernels
