// What products with a quantised weight have in common: the walk through rows, weight rows and codes.
//
//   for each tile of rows                           as the kernel has packed them; in the first-level cache
//     for each few weight rows                      read from memory once
//       for each block of codes      add_block
//       the sums over lanes          finished
//   bias, activation, gate, scale and rounding, row by row
//
// A sum takes the same steps however many rows and weight rows are at hand, so its bits do not depend on them.
#pragma once

#include "cpu/isa/fetch_ahead.h"
#include "cpu/isa/gathered_rows.h"
#include "cpu/isa/gemm_epilogue.h"
#include "cpu/isa/quantized_scales.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

constexpr int kQuantizedCols = 4;                                       // weight rows whose scales are at hand
constexpr int kQuantizedSums = MOEKERNELS_VECTOR_BYTES == 64 ? 16 : 4;  // of a tile, in registers

// Where the pieces of a task lie in its scratch, in bytes: packed rows, then these.
struct QuantizedScratch {
  int64_t scale_stride;  // floats, of the scales of a weight row; a vector is read past their end: zeros
  int64_t width;         // of sums, rounded up to whole vectors
  int64_t sums_stride;   // twice that when gated: the gate's sums, then the value's
  int64_t scales, sums, total;

  QuantizedScratch(const QuantizedGemmParams& p, int64_t columns, int64_t rows, int64_t packed_bytes) {
    constexpr int64_t kFloat = sizeof(float);
    scale_stride = round_up(p.gemm.in_features / p.weight.group, kLanes) + kLanes;
    width = round_up(columns, kLanes);
    sums_stride = p.gemm.gated ? 2 * width : width;
    scales = packed_bytes;
    sums = scales + kQuantizedCols * scale_stride * kFloat;
    total = round_up(sums + rows * sums_stride * kFloat, 64);
  }
};

// `Kernel` derives from this and has
//   kUnit                                              what scales are multiplied with
//   add_block(weight, scales, block, x, totals)        a block of codes of each weight row, times packed rows
//   add_lanes(four, sums)                              the sums over the lanes of four totals
//   finished(sum, row, scales)                         the value of such a sum
// Total and Sum: a vector, and what its lanes add up to. A row of a tile has kPackedBlock elements for a block of
// codes.
template <class Kernel, class Codes, class Packed, class Total, class Sum, int kTileRows, int kBlockWeights,
          int kPackedBlock>
class QuantizedProduct {
 public:
  // Weight rows `first` + the columns of the task, to the sums of every row from `target` on.
  void multiply_columns(int64_t first, int64_t target) {
    for (int64_t tile = 0; tile < tiles_.count; ++tile) {
      for (int64_t c = 0; c < columns_; c += kQuantizedCols) {
        const int64_t n = min(kQuantizedCols, columns_ - c);
        const int64_t weight_row = first + task_.col_begin + c;
        for (int64_t i = 0; i < n; ++i) {
          scales_.load_row(weight_row + i, Kernel::kUnit, scale_rows_ + i * place_.scale_stride);
          scales_.fetch_row(weight_row + i + kQuantizedCols);
        }
        multiply_panel<kTileRows>(weight_row, n, tile, target + c);
      }
    }
  }

 protected:
  // row_size: elements of a packed row.
  QuantizedProduct(const QuantizedGemmParams& params, const GemmTask& task, const QuantizedScratch& place,
                   int64_t row_size, char* scratch)
      : p_(params.gemm),
        task_(task),
        tiles_(task.row_end - task.row_begin, kTileRows),
        row_bytes_(p_.in_features * Codes::kBlockBytes / kBlockWeights),
        scales_(params, task.expert),
        place_(place),
        row_size_(row_size),
        packed_(reinterpret_cast<Packed*>(scratch)),
        scale_rows_(reinterpret_cast<float*>(scratch + place.scales)),
        sums_(reinterpret_cast<float*>(scratch + place.sums)),
        columns_(task.col_end - task.col_begin),
        blocks_(p_.in_features / kBlockWeights),
        matrix_(static_cast<const uint8_t*>(params.weight.codes) + task.expert * params.weight.codes_stride) {
    const int64_t group = params.weight.group;
    if (group >= p_.in_features) {
      group_shift_ = 30;
    } else {
      while (int64_t{1} << group_shift_ < group) ++group_shift_;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      group_of_lane_[lane] = uint32_t(Codes::kLaneWeights * lane >> group_shift_);
    }
    // Of the last block a part may lie behind the row: its sums are zero, and scales must be numbers.
    for (int i = 0; i < kQuantizedCols; ++i) {
      for (int64_t k = scales_.per_row(); k < place.scale_stride; ++k) scale_rows_[i * place.scale_stride + k] = 0.0f;
    }
  }

  Packed* tile_at(int64_t tile) const { return packed_ + tiles_.begin(tile) * row_size_; }

  // What each lane is multiplied with in a block; `scales` are those of the weight row.
  MOEKERNELS_INLINE VecF scales_of_lanes(const float* scales, int64_t block) const {
    return permute_lanes(load(scales + (block * kBlockWeights >> group_shift_)), group_of_lane_);
  }

  MOEKERNELS_INLINE void fetch_codes(const uint8_t* block) const {
    fetch_ahead(block + kQuantizedCols * row_bytes_, Codes::kBlockBytes);
  }

  const GroupedGemmParams& p_;
  const GemmTask& task_;
  const Parts tiles_;  // of the rows

 private:
  const Kernel& kernel() const { return static_cast<const Kernel&>(*this); }

  // A tile, of kRows rows at most, times n <= kQuantizedCols weight rows.
  template <int kRows>
  void multiply_panel(int64_t weight_row, int64_t n, int64_t tile, int64_t target) {
    if constexpr (kRows > 1) {
      if (tiles_.size(tile) < kRows) return multiply_panel<kRows - 1>(weight_row, n, tile, target);
    }
    constexpr int kCols = kRows == 1 || kRows * kQuantizedCols <= kQuantizedSums / 2 ? kQuantizedCols : 2;
    int64_t c = 0;
    for (; c + kCols <= n; c += kCols) multiply<kCols, kRows>(weight_row + c, c, tile, target + c);
    for (; c < n; ++c) multiply<1, kRows>(weight_row + c, c, tile, target + c);
  }

  template <int kCols, int kRows>
  void multiply(int64_t weight_row, int64_t scale_row, int64_t tile, int64_t target) {
    const uint8_t* weight[kCols];
    const float* scales[kCols];
    Total totals[kCols * kRows] = {};
    MOEKERNELS_UNROLL
    for (int c = 0; c < kCols; ++c) {
      weight[c] = matrix_ + (weight_row + c) * row_bytes_;
      scales[c] = scale_rows_ + (scale_row + c) * place_.scale_stride;
    }
    const Packed* x = tile_at(tile);
    for (int64_t block = 0; block < blocks_; ++block, x += kRows * kPackedBlock) {
      kernel().template add_block<kCols, kRows>(weight, scales, block, x, totals);
      MOEKERNELS_UNROLL
      for (int c = 0; c < kCols; ++c) weight[c] += Codes::kBlockBytes;
    }
    if (const int64_t rest = row_bytes_ - blocks_ * Codes::kBlockBytes; rest > 0) {
      uint8_t last[kCols][Codes::kBlockBytes] = {};
      MOEKERNELS_UNROLL
      for (int c = 0; c < kCols; ++c) {
        for (int64_t i = 0; i < rest; ++i) last[c][i] = weight[c][i];
        weight[c] = last[c];
      }
      kernel().template add_block<kCols, kRows>(weight, scales, blocks_, x, totals);
    }
    store_sums<kCols, kRows>(totals, scales, tiles_.begin(tile), target);
  }

  // Four at a time, which changes none.
  template <int kCols, int kRows>
  MOEKERNELS_INLINE void store_sums(const Total (&totals)[kCols * kRows], const float* const (&scales)[kCols],
                                    int64_t first_row, int64_t target) {
    constexpr int kTotals = kCols * kRows;
    MOEKERNELS_UNROLL
    for (int first = 0; first < kTotals; first += 4) {
      Total four[4] = {};
      Sum sums[4];
      MOEKERNELS_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (first + i < kTotals) four[i] = totals[first + i];
      }
      Kernel::add_lanes(four, sums);
      MOEKERNELS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = first + i;
        if (at >= kTotals) continue;
        const int64_t row = first_row + at / kCols;
        sums_[row * place_.sums_stride + target + at % kCols] = kernel().finished(sums[i], row, scales[at % kCols]);
      }
    }
  }

  const int64_t row_bytes_;  // of codes
  const QuantizedScales scales_;
  const QuantizedScratch& place_;
  const int64_t row_size_;
  Packed* const packed_;
  float* const scale_rows_;
  float* const sums_;
  const int64_t columns_;
  const int64_t blocks_;  // whole ones of a row
  const uint8_t* const matrix_;
  int group_shift_ = 0;
  VecU group_of_lane_;  // which of the scales of a block
};

template <class T>
void finish_rows(const GroupedGemmParams& p, const GemmTask& task, int64_t width, int64_t stride, const float* sums) {
  const GemmEpilogue<T> epilogue(p, task);
  const int64_t columns = task.col_end - task.col_begin;
  for (int64_t row = task.row_begin; row < task.row_end; ++row, sums += stride) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t n = columns - c;
      const VecF value = p.gated ? load_n(sums + width + c, n) : VecF{};
      epilogue.store(row, task.col_begin + c, n, load_n(sums + c, n), value);
    }
  }
}

// A task by `Product`, which is a kernel for rows of T.
template <class T, class Product>
void run_product(const QuantizedGemmParams& params, const GemmTask& task, char* scratch) {
  const GroupedGemmParams& p = params.gemm;
  const QuantizedScratch place = Product::scratch(params, task.col_end - task.col_begin);
  Product product(params, task, place, scratch);
  if (!task.rows_packed) product.template pack_rows<T>();
  product.multiply_columns(0, 0);
  if (p.gated) product.multiply_columns(p.out_features / 2, place.width);
  finish_rows<T>(p, task, place.width, place.sums_stride, reinterpret_cast<float*>(scratch + place.sums));
}

}  // namespace
}  // namespace moekernels::cpu
