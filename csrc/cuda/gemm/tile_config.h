// Which grouped GEMM runs, and with which tiles: plain data, chosen by a pure function of the problem.
//
// Nothing here looks at a device or at the routing: sizes the host cannot know (rows per expert) enter by their
// average. With `batch_invariant` the choice depends on the weight's shape and on the device alone, never on the number
// of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/rounding.h"
#include "moekernels/params.h"

namespace moekernels {

enum class GemmPath : int32_t {
  kF32 = 0,     // float32 on the CUDA cores
  kSm80 = 1,    // mma.sync: 16-bit types, and float32 where tf32 is allowed; sm_80 and newer
  kSm90 = 2,    // wgmma and TMA; 16-byte aligned problems on sm_90a
  kDecode = 3,  // few rows per expert: streams each touched expert's weights once
};

constexpr const char* name_of(GemmPath path) {
  switch (path) {
    case GemmPath::kF32:
      return "f32";
    case GemmPath::kSm80:
      return "sm80";
    case GemmPath::kSm90:
      return "sm90";
    case GemmPath::kDecode:
      return "decode";
  }
  return "unknown";
}

// What the choice depends on. M, N, K as in params.h: N rows, M out_features, K in_features.
struct GemmProblem {
  int64_t num_rows;  // the upper bound
  int64_t out_features;
  int64_t in_features;
  int32_t num_experts;
  DType dtype;
  bool gated;
  bool gathered;  // rows are read through token_of_row
  bool aligned;   // rows and weight: 16-byte aligned, and so is every row of theirs
  bool allow_tf32;
  bool batch_invariant;
  int compute_capability;  // 80, 86, 90, ...
  int sm_count;
  bool transposed;  // weight [E, K, M]
  bool in_parts;    // the weight or the bias is a table
};

// More experts than that are done in several launches, so that a schedule in shared memory has a known size.
constexpr int32_t kMaxExpertsPerLaunch = 1024;

struct TileConfig {
  GemmPath path;
  int tile_m;            // rows of a tile
  int tile_n;            // weight rows of a tile; when gated, half of them are gates and half values
  int tile_k;            // K of a stage
  int stages;            // of the pipeline
  int group_m;           // this many tiles of rows share the sweep over columns, so that both stay in L2
  int cluster = 1;       // blocks that share weights, each with a tile of rows of its own
  bool in_turn = false;  // kSm90: one half of a tile is stored while the other is still multiplied

  bool operator==(const TileConfig&) const = default;
};

// "sm80 128x128x32, 4 stages, groups of 8"
inline std::string to_string(const TileConfig& c) {
  return std::string(name_of(c.path)) + " " + std::to_string(c.tile_m) + "x" + std::to_string(c.tile_n) + "x" +
         std::to_string(c.tile_k) + ", " + std::to_string(c.stages) + " stages, groups of " +
         std::to_string(c.group_m) + (c.cluster > 1 ? ", clusters of " + std::to_string(c.cluster) : "") +
         (c.in_turn ? ", in turn" : "");
}

// Whether every row of `rows` and `weight` starts at a multiple of 16 bytes.
inline bool has_aligned_rows(const GroupedGemmParams& p) {
  const auto is_aligned = [&p](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size_of(p.dtype) % 16 == 0;
  };
  if (!is_aligned(p.rows, p.row_stride)) return false;
  if (p.weight_parts == nullptr) {
    return is_aligned(p.weight, p.weight_row_stride) && is_aligned(p.weight, p.weight_expert_stride);
  }
  return std::all_of(p.weight_parts, p.weight_parts + int64_t{p.num_experts} * p.num_parts,
                     [&](const WeightPart& part) { return is_aligned(part.data, part.row_stride); });
}

inline int bits_of(CodeOrder order) {
  return order == CodeOrder::kBytes ? 8 : 4;
}

inline GemmProblem gemm_problem(const GroupedGemmParams& p, int compute_capability, int sm_count) {
  GemmProblem problem{};
  problem.num_rows = p.num_rows;
  problem.out_features = p.out_features;
  problem.in_features = p.in_features;
  problem.num_experts = p.num_experts;
  problem.dtype = p.dtype;
  problem.gated = p.gated;
  problem.gathered = p.token_of_row != nullptr;
  problem.aligned = has_aligned_rows(p);
  problem.allow_tf32 = p.allow_tf32;
  problem.batch_invariant = p.batch_invariant;
  problem.compute_capability = compute_capability;
  problem.sm_count = sm_count;
  problem.transposed = p.transposed;
  problem.in_parts = p.weight_parts != nullptr || p.bias_parts != nullptr;
  return problem;
}

// Rows an expert gets where all get the same.
inline int64_t rows_per_expert(const GemmProblem& p) {
  return ceil_div(p.num_rows, std::max(p.num_experts, 1));
}

// An upper bound of the tiles of rows, whatever the routing: each expert that has rows wastes less than one tile.
inline int64_t max_row_tiles(int64_t num_rows, int64_t num_experts, int64_t tile_m) {
  return (num_rows + std::min(num_experts, num_rows) * (tile_m - 1)) / tile_m;
}

// The tiles to expect where all experts get the same.
inline int64_t expected_tiles(const GemmProblem& p, int64_t tile_m, int64_t tile_n) {
  const int64_t experts = std::min<int64_t>(p.num_experts, p.num_rows);
  const int64_t row_tiles = experts * ceil_div(rows_per_expert(p), tile_m);
  return row_tiles * ceil_div(p.out_features, tile_n);
}

// ---- the decode path ----

constexpr int64_t kDecodeRowsPerExpert = 4;  // on average: reading the weights dominates
constexpr int64_t kDecodeRows = 32;          // so few rows are one pass even if one expert has them all

// The decode path reads whole vectors of 16 bytes only, along K.
inline bool prefers_decode(const GemmProblem& p) {
  if (p.transposed || p.batch_invariant || !p.aligned || p.in_features == 0) return false;
  if (p.in_features * size_of(p.dtype) % 16 != 0 || p.num_experts > kMaxExpertsPerLaunch) return false;
  return p.num_rows <= kDecodeRows || p.num_rows <= kDecodeRowsPerExpert * p.num_experts;
}

// tile_m: rows of an expert per pass over its weights; tile_k: the columns a block has in flight, so that it has
// tile_n * tile_k weights on their way: 64 KB with two blocks per multiprocessor at 8 rows, 32 KB otherwise; of codes
// half of it, which is all there is of 2048 columns of 4 bits. `weight_bits`: of a code, 0 where the weight is plain.
inline TileConfig decode_config(const GemmProblem& p, int weight_bits = 0) {
  const int64_t experts = std::max<int64_t>(std::min<int64_t>(p.num_experts, p.num_rows), 1);
  const int bits = weight_bits > 0 ? weight_bits : 8 * static_cast<int>(size_of(p.dtype));
  const int wide = 8 * (weight_bits > 0 ? 2 : 4) * 64 * 8 / bits;  // warps * chunks * columns of 64 bytes
  if (p.dtype == DType::kFloat32) return {GemmPath::kDecode, 8, 16, wide, /*stages=*/1, /*group_m=*/1};
  // An expert with more than 8 rows reads its weights again, from L2; a few of those are worth the leaner kernel.
  if (p.num_rows > 8 && p.num_rows > 2 * experts) {
    if (weight_bits > 0) return {GemmPath::kDecode, 32, 16, wide, 1, 1};  // no registers for more
    return {GemmPath::kDecode, 32, 32, wide / 2, 1, 1};
  }
  const bool fills_device = experts * ((p.out_features + 31) / 32) >= 2 * p.sm_count;
  if (fills_device) return {GemmPath::kDecode, 8, 32, wide, 1, 1};
  return {GemmPath::kDecode, 8, 16, 2 * wide, 1, 1};
}

// ---- the tiled paths ----

// Tiles of rows that run together: about as many as make a square of what all multiprocessors hold.
constexpr int kGroupM = 16;

// From so many rows per expert on, pairs of blocks share weights: a pair reads 64 KB of a step through L2 where two
// blocks read 96. Half a pair without rows, at most one per expert and tile of columns, costs less than that then.
//
// Consumers take turns in pairs alone: there the tensor cores set the pace, and their pause at the end of a tile costs
// time. Elsewhere L2 does, and fills the ring meanwhile.
constexpr int64_t kPairedRowsPerExpert = 512;

inline TileConfig sm90_config(const GemmProblem& p) {
  constexpr TileConfig kWide{GemmPath::kSm90, 128, 256, 64, /*stages=*/4, kGroupM};
  constexpr TileConfig kNarrow{GemmPath::kSm90, 128, 128, 64, /*stages=*/6, kGroupM};
  if (p.out_features <= 128) return kNarrow;
  if (p.batch_invariant) return kWide;
  // Shared memory moves 80 KB in a step of the narrow tile and 128 KB in one of the wide, at 128 bytes a clock: two of
  // the narrow take longer than one of the wide, and are better only side by side.
  if (2 * expected_tiles(p, 128, 256) <= p.sm_count) return kNarrow;
  TileConfig config = kWide;
  if (rows_per_expert(p) >= kPairedRowsPerExpert) {
    config.cluster = 2;
    config.in_turn = true;
  }
  return config;
}

// K of a stage: 64 bytes of each row.
constexpr int kTileK16Bit = 32;
constexpr int kTileK32Bit = 16;

// Tiles of 128 rows reuse the weights more; tiles of 64 rows waste less where experts have few rows, or spread little
// work over more multiprocessors. The order of sums is the same for both. Rows that are not aligned go through
// registers, one element at a time, and only by the small tile.
inline bool prefers_large_tiles(const GemmProblem& p) {
  if (p.in_parts && p.dtype == DType::kFloat32) return false;  // no registers left to look rows up
  return p.aligned && rows_per_expert(p) > 64 && expected_tiles(p, 128, 128) >= p.sm_count;
}

// Consumer cards: 100 KB of shared memory per multiprocessor, where two blocks should still fit.
constexpr bool has_small_smem(int compute_capability) {
  return compute_capability == 86 || compute_capability == 89 || compute_capability >= 120;
}

inline TileConfig sm80_config(const GemmProblem& p) {
  const int tile_k = p.dtype == DType::kFloat32 ? kTileK32Bit : kTileK16Bit;
  if (!prefers_large_tiles(p)) return {GemmPath::kSm80, 64, 128, tile_k, 4, kGroupM};
  return {GemmPath::kSm80, 128, 128, tile_k, has_small_smem(p.compute_capability) ? 3 : 4, kGroupM};
}

// Of a quantised weight, whose codes have so many bits. The decode kernel can do with any number of rows what it does
// with few; in float32 there is no other.
inline TileConfig quantized_config(const GemmProblem& p, int weight_bits) {
  const bool decodes = !p.transposed && (p.dtype == DType::kFloat32 || prefers_decode(p));
  return decodes ? decode_config(p, weight_bits) : sm80_config(p);
}

inline TileConfig f32_config(const GemmProblem& p) {
  if (!prefers_large_tiles(p)) return {GemmPath::kF32, 64, 128, kTileK32Bit, 4, kGroupM};
  return {GemmPath::kF32, 128, 128, kTileK32Bit, 3, kGroupM};
}

inline TileConfig choose_tile_config(const GemmProblem& p) {
  if (prefers_decode(p)) return decode_config(p);
  if (p.dtype == DType::kFloat32) return p.allow_tf32 ? sm80_config(p) : f32_config(p);
  // A tensor map describes a stack.
  if (p.compute_capability == 90 && p.aligned && p.in_features > 0 && !p.in_parts) return sm90_config(p);
  return sm80_config(p);
}

}  // namespace moekernels
