// A weight times few packed rows, both split in three (amx/split.h), nearly as fast as the weight comes from memory.
//
//   for each group of 16 weight rows             read along K in one go: 16 streams, of which none pauses
//     for each chunk of K                        whose sums start anew and are added up in float32
//       for each tile of the weight              the next one is split meanwhile, and a later one fetched
//         for each part of the rows, x2 first
//           for each group of rows               its tile, loaded once, times the parts of the weight that matter
//
// Of rows x and a weight y an output adds up x2 y0, x1 y1, x1 y0, x0 y2, x0 y1 and x0 y0 of each tile of K, whatever is
// computed beside it.
#pragma once

#include "cpu/isa/amx/product.h"
#include "cpu/isa/amx/split.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kStreamGroups = 4;  // of rows: one register for the sums of each, beside the weight's three parts
constexpr int64_t kStreamRows = kStreamGroups * kAmxRows;
constexpr int64_t kStreamSlots = 2;  // for tiles of the weight: one is multiplied, and the next one is split
constexpr int64_t kStreamElements = kStreamSlots * kAmxElements;

// A tile of the weight that is to be split, and the lines that are to be fetched meanwhile.
struct SplitStep {
  const float* const* rows;
  int64_t k;
  uint32_t lanes;
  BFloat16* to;
  const float* const* fetch_rows;
  int64_t fetch_k;

  template <int kFirst, int kEnd>
  MOEKERNELS_INLINE void split_rows() const {
    MOEKERNELS_UNROLL
    for (int row = kFirst; row < kEnd; ++row) {
      const char* fetched = reinterpret_cast<const char*>(fetch_rows[row] + fetch_k);
      _mm_prefetch(fetched, _MM_HINT_T1);
      _mm_prefetch(fetched + sizeof(VecF), _MM_HINT_T1);
      split_row(rows[row] + k, lanes, to + row * kAmxDepth);
    }
  }
};

// Groups of weight rows on their way from memory, split tile by tile, one ahead of the multiplications.
template <class Row>
class SplitStream {
 public:
  // row(group, i) is row i of a group, n elements of K; scratch holds kStreamSlots tiles.
  SplitStream(BFloat16* scratch, int64_t groups, int64_t n, const Row& row)
      : row_(row), slots_(scratch), groups_(groups), n_(n), tiles_(groups_of(n, kAmxDepth)) {
    find(0, rows_);
    find(1, next_rows_);
    split_next().template split_rows<0, kAmxRows>();
  }

  int64_t tiles() const { return tiles_; }  // of a group

  // The tile that was split last.
  MOEKERNELS_INLINE const BFloat16* tile() const { return slot(num_split_ - 1); }

  // After the last tile of all, the last group begins again: nobody multiplies that.
  MOEKERNELS_INLINE SplitStep split_next() {
    constexpr int64_t kTilesAhead = 8;  // as far as fetching goes
    if (tile_ == tiles_) go_on();
    const int64_t k = tile_ * kAmxDepth, ahead = tile_ + kTilesAhead - tiles_;
    const SplitStep step = {
        .rows = rows_,
        .k = k,
        .lanes = first_lanes(n_ - k),
        .to = slot(num_split_),
        .fetch_rows = ahead < 0 ? rows_ : next_rows_,
        .fetch_k = ahead < 0 ? k + kTilesAhead * kAmxDepth : ahead * kAmxDepth,
    };
    ++tile_;
    ++num_split_;
    return step;
  }

 private:
  MOEKERNELS_INLINE BFloat16* slot(int64_t tile) const { return slots_ + tile % kStreamSlots * kSplitTile; }

  void find(int64_t group, const float* (&rows)[kAmxRows]) const {
    for (int64_t i = 0; i < kAmxRows; ++i) rows[i] = row_(min(group, groups_ - 1), i);
  }

  __attribute__((noinline)) void go_on() {
    tile_ = 0;
    ++group_;
    find(group_, rows_);
    find(group_ + 1, next_rows_);
  }

  const Row row_;
  BFloat16* const slots_;
  const int64_t groups_, n_, tiles_;
  int64_t group_ = 0, tile_ = 0, num_split_ = 0;
  const float *rows_[kAmxRows], *next_rows_[kAmxRows];
};

// sums += the parts of the weight in registers 4 to 6 * a part of a group of rows, as far as they matter
template <int kGroup, int kPart>
MOEKERNELS_INLINE void multiply_part_of_group(const BFloat16* part) {
  _tile_loadd(7, part, kAmxStride);
  if constexpr (kGroup == 0) {
    if constexpr (kPart < 1) _tile_dpbf16ps(0, 6, 7);
    if constexpr (kPart < 2) _tile_dpbf16ps(0, 5, 7);
    _tile_dpbf16ps(0, 4, 7);
  } else if constexpr (kGroup == 1) {
    if constexpr (kPart < 1) _tile_dpbf16ps(1, 6, 7);
    if constexpr (kPart < 2) _tile_dpbf16ps(1, 5, 7);
    _tile_dpbf16ps(1, 4, 7);
  } else if constexpr (kGroup == 2) {
    if constexpr (kPart < 1) _tile_dpbf16ps(2, 6, 7);
    if constexpr (kPart < 2) _tile_dpbf16ps(2, 5, 7);
    _tile_dpbf16ps(2, 4, 7);
  } else {
    if constexpr (kPart < 1) _tile_dpbf16ps(3, 6, 7);
    if constexpr (kPart < 2) _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(3, 4, 7);
  }
}

// The same for all groups of rows, with a share of the next tile's splitting after each.
template <int kGroups, int kPart, int kGroup = 0>
MOEKERNELS_INLINE void multiply_part(const BFloat16* rows, int64_t group_stride, const SplitStep& next) {
  if constexpr (kGroup < kGroups) {
    multiply_part_of_group<kGroup, kPart>(rows + kGroup * group_stride + kPart * kAmxElements);
    constexpr int kShares = kSplitParts * kGroups, kShare = (kSplitParts - 1 - kPart) * kGroups + kGroup;
    constexpr int kFirst = kAmxRows * kShare / kShares, kEnd = kAmxRows * (kShare + 1) / kShares;
    next.template split_rows<kFirst, kEnd>();
    multiply_part<kGroups, kPart, kGroup + 1>(rows, group_stride, next);
  }
}

// sums[g] (+)= the stream's next `tiles` tiles * those of group g of the rows
template <int kGroups, class Stream>
void multiply_chunk(Stream& weight, int64_t tiles, const BFloat16* rows, int64_t group_stride, float* sums, bool add) {
  _tile_zero(0);
  if constexpr (kGroups > 1) _tile_zero(1);
  if constexpr (kGroups > 2) _tile_zero(2);
  if constexpr (kGroups > 3) _tile_zero(3);
  for (int64_t tile = 0; tile < tiles; ++tile, rows += kSplitTile) {
    const BFloat16* parts = weight.tile();
    const SplitStep next = weight.split_next();
    asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
    _tile_loadd(4, parts, kAmxStride);
    multiply_part<kGroups, 2>(rows, group_stride, next);
    _tile_loadd(5, parts + kAmxElements, kAmxStride);
    multiply_part<kGroups, 1>(rows, group_stride, next);
    _tile_loadd(6, parts + 2 * kAmxElements, kAmxStride);
    multiply_part<kGroups, 0>(rows, group_stride, next);
  }
  alignas(64) float chunk[kGroups * kAmxSums];
  float* const to = add ? chunk : sums;
  _tile_stored(0, to, kAmxStride);
  if constexpr (kGroups > 1) _tile_stored(1, to + kAmxSums, kAmxStride);
  if constexpr (kGroups > 2) _tile_stored(2, to + 2 * kAmxSums, kAmxStride);
  if constexpr (kGroups > 3) _tile_stored(3, to + 3 * kAmxSums, kAmxStride);
  if (!add) return;
  for (int i = 0; i < kGroups * kAmxSums; i += kLanes) store(sums + i, load(sums + i) + load(chunk + i));
}

// sums[g] (+)= the stream's next group of weight rows * group g of the rows, at most kStreamGroups
template <class Stream>
void multiply_group(Stream& weight, int64_t groups, const SplitPacked& rows, float* sums, bool add) {
  constexpr int64_t kChunkTiles = kSplitChunk / kAmxDepth;
  const int64_t group_stride = rows.tiles() * kSplitTile;
  const auto multiply = groups == 1   ? multiply_chunk<1, Stream>
                        : groups == 2 ? multiply_chunk<2, Stream>
                        : groups == 3 ? multiply_chunk<3, Stream>
                                      : multiply_chunk<4, Stream>;
  for (int64_t tile = 0; tile < weight.tiles(); tile += kChunkTiles) {
    multiply(weight, min(kChunkTiles, weight.tiles() - tile), rows.at(0, tile), group_stride, sums, add || tile > 0);
  }
}

}  // namespace
}  // namespace moekernels::cpu
