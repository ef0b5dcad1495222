// One task of the grouped GEMM: packs its rows, multiplies them with its columns' weight rows, finishes the sums.
//
//   for each block of K that fits the packed buffer          (one, unless rows x K is large)
//     pack the rows, gathering and widening                  into tiles [steps][tile rows][step]
//     for each panel of 4 weight rows                        read from memory once
//       for each chunk of K                                  panel and tile stay in the first-level cache
//         for each tile of rows                              multiply_tile; the next panel is prefetched meanwhile
//   bias, activation, gate, scale and rounding, row by row
#pragma once

#include "gemm_tile.h"
#include "kernel_table.h"
#include "vector_math.h"

namespace moekernels::cpu {
namespace {

MOEKERNELS_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
MOEKERNELS_INLINE int64_t rounded_up(int64_t a, int64_t b) {
  return (a + b - 1) / b * b;
}

template <class Dot>
class GemmTaskRunner {
 public:
  using Weight = typename Dot::Weight;
  using Packed = typename Dot::Packed;

  GemmTaskRunner(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task, void* scratch)
      : p_(params),
        depth_(blocking.depth),
        task_(task),
        packed_(static_cast<Packed*>(scratch)),
        sums_(reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.packed_bytes)),
        rows_(task.row_end - task.row_begin),
        tiles_((rows_ + kTileRows - 1) / kTileRows),
        cols_(task.col_end - task.col_begin),
        width_(rounded_up(cols_, kTileCols)),
        sums_stride_(params.gated ? 2 * width_ : width_) {}

  void run() {
    if (p_.in_features == 0) {
      for (int64_t i = 0; i < rows_ * sums_stride_; ++i) sums_[i] = 0.0f;
    }
    for (int64_t k = 0; k < p_.in_features; k += depth_) {
      const int64_t n = smaller(depth_, p_.in_features - k);
      pack(k, n);
      multiply(k, n);
    }
    for (int64_t row = 0; row < rows_; ++row) finish(row);
  }

 private:
  // Tiles differ by at most one row, so that none is left with a single one.
  int64_t tile_begin(int64_t tile) const { return rows_ * tile / tiles_; }

  const Weight* source_row(int64_t row) const {
    int64_t source = task_.row_begin + row;
    if (p_.token_of_row != nullptr) {
      source = p_.token_of_row[source];
      if (source < 0 || source >= p_.num_source_rows) return nullptr;
    }
    return static_cast<const Weight*>(p_.rows) + source * p_.row_stride;
  }

  // rows[:, k : k + n], widened, the last step filled up with zeros
  void pack(int64_t k, int64_t n) {
    const int64_t padded = rounded_up(n, Dot::kStep);
    const Weight zeros[Dot::kStep] = {};
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t begin = tile_begin(tile);
      const int64_t stride = (tile_begin(tile + 1) - begin) * Dot::kStep;
      for (int64_t row = begin; row < tile_begin(tile + 1); ++row) {
        Packed* target = packed_ + begin * padded + (row - begin) * Dot::kStep;
        const Weight* source = source_row(row);
        const int64_t whole = source == nullptr ? 0 : n / Dot::kStep * Dot::kStep;
        int64_t i = 0;
        for (; i < whole; i += Dot::kStep, target += stride) Dot::pack(source + k + i, target);
        for (; i < padded; i += Dot::kStep, target += stride) {
          Weight last[Dot::kStep] = {};
          for (int64_t j = i; source != nullptr && j < n; ++j) last[j - i] = source[k + j];
          Dot::pack(source == nullptr ? zeros : last, target);
        }
      }
    }
  }

  // The weight rows of a panel; gate panels come first, then value panels. Past the last column it repeats.
  void weight_rows(int64_t panel, int64_t k, const Weight* (&weight)[kTileCols]) const {
    const bool value = panel * kTileCols >= width_;
    const int64_t first = panel * kTileCols - (value ? width_ : 0);
    const int64_t base = task_.col_begin + (value ? p_.out_features / 2 : 0);
    const Weight* expert = static_cast<const Weight*>(p_.weight) + task_.expert * p_.weight_expert_stride;
    for (int64_t c = 0; c < kTileCols; ++c) {
      weight[c] = expert + (base + smaller(first + c, cols_ - 1)) * p_.weight_row_stride + k;
    }
  }

  void multiply(int64_t k_block, int64_t n_block) {
    const int64_t padded = rounded_up(n_block, Dot::kStep);
    const int64_t panels = sums_stride_ / kTileCols;
    const Weight* weight[kTileCols];
    const Weight* next[kTileCols];
    weight_rows(0, k_block, next);
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int c = 0; c < kTileCols; ++c) weight[c] = next[c];
      const bool last = panel + 1 == panels;
      if (!last) weight_rows(panel + 1, k_block, next);
      for (int64_t k = 0; k < n_block; k += Dot::kChunk) {
        TileOperands<Dot> t;
        t.n = smaller(Dot::kChunk, n_block - k);
        t.sums_stride = sums_stride_;
        t.add = k_block + k > 0;
        for (int c = 0; c < kTileCols; ++c) t.weight[c] = weight[c] + k;
        for (int64_t tile = 0; tile < tiles_; ++tile) {
          const int64_t begin = tile_begin(tile);
          const int64_t rows = tile_begin(tile + 1) - begin;
          t.rows = packed_ + begin * padded + k * rows;
          t.sums = sums_ + begin * sums_stride_ + panel * kTileCols;
          if (!last && tile < kTileCols) {
            // The first tiles share the four rows of the next panel among them.
            for (int c = 0; c < kTileCols; ++c) {
              t.prefetch[c] = c % smaller(tiles_, kTileCols) == tile ? next[c] + k : t.weight[c];
            }
            multiply_tile<Dot, true>(rows, t);
          } else {
            multiply_tile<Dot, false>(rows, t);
          }
        }
      }
    }
  }

  const Weight* bias(int64_t offset) const {
    if (p_.bias == nullptr) return nullptr;
    return static_cast<const Weight*>(p_.bias) + task_.expert * p_.bias_stride + task_.col_begin + offset;
  }

  void finish(int64_t row) {
    const int64_t out_width = p_.gated ? p_.out_features / 2 : p_.out_features;
    const int64_t out_row = task_.row_begin + row;
    const float* sums = sums_ + row * sums_stride_;
    const Weight* gate_bias = bias(0);
    const Weight* value_bias = bias(out_width);
    Weight* out = static_cast<Weight*>(p_.out) + out_row * out_width + task_.col_begin;
    const float scale = p_.row_scale == nullptr ? 1.0f : p_.row_scale[out_row];
    for (int64_t c = 0; c < cols_; c += kLanes) {
      const int64_t n = cols_ - c;
      VecF x = load_n(sums + c, n);
      if (gate_bias != nullptr) x += load_n(gate_bias + c, n);
      x = activate(p_.activation, x);
      if (p_.gated) {
        VecF value = load_n(sums + width_ + c, n);
        if (value_bias != nullptr) value += load_n(value_bias + c, n);
        x *= value;
      }
      if (p_.row_scale != nullptr) x *= scale;
      store_n(out + c, x, n);
    }
  }

  const GroupedGemmParams& p_;
  const int64_t depth_;
  const GemmTask& task_;
  Packed* const packed_;
  float* const sums_;
  const int64_t rows_, tiles_, cols_;
  const int64_t width_;        // columns, a whole number of panels
  const int64_t sums_stride_;  // twice that when gated: the gate's sums, then the value's
};

template <class Dot>
void run_gemm_task(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task, void* scratch) {
  GemmTaskRunner<Dot>(params, blocking, task, scratch).run();
}

template <class Dot>
constexpr GemmKernel gemm_kernel() {
  return {sizeof(typename Dot::Packed), Dot::kChunk, run_gemm_task<Dot>};
}

}  // namespace
}  // namespace moekernels::cpu
