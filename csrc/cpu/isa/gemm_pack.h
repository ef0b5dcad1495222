// A task's rows as operands of multiply_tile, in scratch memory.
#pragma once

#include "cpu/isa/gemm_tile.h"
#include "cpu/isa/parts.h"

namespace moekernels::cpu {
namespace {

// Rows cut into tiles of [steps][tile rows][Dot::kStep], widened, the last step filled up with zeros. Tiles differ by
// at most one row, so that none is left with a single one.
template <class Dot>
class PackedRows {
 public:
  using Weight = typename Dot::Weight;
  using Packed = typename Dot::Packed;

  PackedRows(void* memory, int64_t rows)
      : packed_(static_cast<Packed*>(memory)),
        tiles_(ceil_div(rows, Dot::kTileRows)),
        least_(tiles_ > 0 ? rows / tiles_ : 0),
        larger_(rows - tiles_ * least_) {}

  int64_t rows() const { return tile_begin(tiles_); }
  int64_t tiles() const { return tiles_; }
  int64_t tile_begin(int64_t tile) const { return tile * least_ + min(tile, larger_); }
  int64_t tile_rows(int64_t tile) const { return least_ + (tile < larger_); }

  // Where element k, a multiple of Dot::kStep, of a tile's rows begins.
  const Packed* at(int64_t tile, int64_t k) const { return packed_ + tile_begin(tile) * depth_ + k * tile_rows(tile); }

  // Rows of n elements, which are in memory already or will be packed.
  void resize(int64_t n) { depth_ = round_up(n, Dot::kStep); }

  // Each row is source(row)[0 .. n); null: zeros.
  template <class Source>
  void pack(const Source& source, int64_t n) {
    resize(n);
    const Weight zeros[Dot::kStep] = {};
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t stride = tile_rows(tile) * Dot::kStep;
      for (int64_t row = tile_begin(tile); row < tile_begin(tile + 1); ++row) {
        Packed* target = packed_ + tile_begin(tile) * depth_ + (row - tile_begin(tile)) * Dot::kStep;
        const Weight* weights = source(row);
        const int64_t whole = weights == nullptr ? 0 : n / Dot::kStep * Dot::kStep;
        int64_t i = 0;
        for (; i < whole; i += Dot::kStep, target += stride) Dot::pack(weights + i, target);
        for (; i < depth_; i += Dot::kStep, target += stride) {
          Weight last[Dot::kStep] = {};
          for (int64_t j = i; weights != nullptr && j < n; ++j) last[j - i] = weights[j];
          Dot::pack(weights == nullptr ? zeros : last, target);
        }
      }
    }
  }

 private:
  Packed* packed_;
  int64_t tiles_;
  int64_t least_, larger_;  // the rows of a tile, and how many tiles have one more
  int64_t depth_ = 0;
};

// One chunk of K of the rows of tiles begin .. end times one panel of weights; `t` has the weights, n and what to do
// with the sums. What is far is fetched by the first tiles of all, which share it, and where it pays
// (MOEKERNELS_FETCH_FROM_MEMORY); what is near by the last tile. With one or two rows the processor runs so far ahead
// by itself that the first of these fetches only costs.
template <class Dot>
MOEKERNELS_INLINE void multiply_panel(const PackedRows<Dot>& rows, int64_t begin, int64_t end, int64_t k, float* sums,
                                      TileOperands<Dot>& t) {
  const int64_t sharers = MOEKERNELS_FETCH_FROM_MEMORY && rows.rows() > 2 ? min(rows.tiles(), kTileCols) : 0;
  const typename Dot::Weight* far[kTileCols];
  for (int c = 0; c < kTileCols; ++c) far[c] = t.far[c];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t tile_rows = rows.tile_rows(tile);
    t.rows = rows.at(tile, k);
    t.sums = sums + rows.tile_begin(tile) * t.sums_stride;
    const bool near = tile == end - 1;
    if (tile < sharers) {
      if (sharers > 1) {
        for (int c = 0; c < kTileCols; ++c) t.far[c] = c % sharers == tile ? far[c] : t.weight[c];
      }
      near ? multiply_tile<Dot, Prefetch::kBoth>(tile_rows, t) : multiply_tile<Dot, Prefetch::kFar>(tile_rows, t);
    } else {
      near ? multiply_tile<Dot, Prefetch::kNear>(tile_rows, t) : multiply_tile<Dot, Prefetch::kNone>(tile_rows, t);
    }
  }
}

}  // namespace
}  // namespace moekernels::cpu
