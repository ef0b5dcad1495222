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
      : packed_(static_cast<Packed*>(memory)), rows_(rows), tiles_(ceil_div(rows, kTileRows)) {}

  int64_t rows() const { return rows_; }
  int64_t tiles() const { return tiles_; }
  int64_t tile_begin(int64_t tile) const { return rows_ * tile / tiles_; }
  int64_t tile_rows(int64_t tile) const { return tile_begin(tile + 1) - tile_begin(tile); }

  // Where element k, a multiple of Dot::kStep, of a tile's rows begins.
  const Packed* at(int64_t tile, int64_t k) const { return packed_ + tile_begin(tile) * depth_ + k * tile_rows(tile); }

  // Each row is source(row)[0 .. n); null: zeros.
  template <class Source>
  void pack(const Source& source, int64_t n) {
    depth_ = round_up(n, Dot::kStep);
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
  int64_t rows_, tiles_;
  int64_t depth_ = 0;
};

// What is fetched while a panel of weights is multiplied, a chunk of K at a time.
template <class Weight>
struct PanelFetch {
  const Weight* far[kTileCols];   // from memory, by the first tiles, which share them; unless has_far is false,
                                  // and where MOEKERNELS_FETCH_FROM_MEMORY says that it pays
  const Weight* near[kTileCols];  // from the second-level cache, by the last one; unless has_near is false
  bool has_far = false;
  bool has_near = false;
};

// One chunk of K of all rows times one panel of weights; `t` has the weights, n and what to do with the sums.
template <class Dot>
MOEKERNELS_INLINE void multiply_panel(const PackedRows<Dot>& rows, int64_t k, float* sums,
                                      const PanelFetch<typename Dot::Weight>& fetch, TileOperands<Dot>& t) {
  for (int64_t tile = 0; tile < rows.tiles(); ++tile) {
    const int64_t tile_rows = rows.tile_rows(tile);
    t.rows = rows.at(tile, k);
    t.sums = sums + rows.tile_begin(tile) * t.sums_stride;
    if (MOEKERNELS_FETCH_FROM_MEMORY && fetch.has_far && tile < kTileCols) {
      const int64_t sharers = min(rows.tiles(), kTileCols);
      for (int c = 0; c < kTileCols; ++c) t.prefetch[c] = c % sharers == tile ? fetch.far[c] : t.weight[c];
      multiply_tile<Dot, Prefetch::kToSecondLevel>(tile_rows, t);
    } else if (fetch.has_near && tile == rows.tiles() - 1) {
      for (int c = 0; c < kTileCols; ++c) t.prefetch[c] = fetch.near[c];
      multiply_tile<Dot, Prefetch::kToFirstLevel>(tile_rows, t);
    } else {
      multiply_tile<Dot, Prefetch::kNone>(tile_rows, t);
    }
  }
}

}  // namespace
}  // namespace moekernels::cpu
