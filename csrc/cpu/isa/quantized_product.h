// What products with a quantised weight have in common: the walk through rows, weight rows and codes.
//
//   for each tile of rows                           as the kernel has packed them; in the first-level cache
//     for each few weight rows                      read from memory once
//       for each block of codes      add_block
//       the sums over lanes
//     for each row                   finish_sums
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

constexpr int kQuantizedCols = 4;  // weight rows whose scales are at hand

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
//   kScaledSums                                        whether they are, in finish_sums instead of add_block
//   kCols<kRows>                                       weight rows at a time, 4 at most, times kRows rows
//   add_block(weight, scales, block, x, totals)        a block of codes of each weight row, times packed rows
//   add_lanes(four, sums)                              the sums over the lanes of four totals
//   finish_sums(sums, n, row, weight_row)              the values of such sums of a row, in their place
// Total and Sum: a vector, and what its lanes add up to, of 32 bits. A row of a tile has kPackedBlock elements for a
// block of codes.
template <class Kernel, class Codes, class Packed, class Total, class Sum, int kTileRows, int kBlockWeights,
          int kPackedBlock>
class QuantizedProduct {
 public:
  // Weight rows `first` + the columns of the task, to the sums of every row from `target` on.
  void multiply_columns(int64_t first, int64_t target) {
    const int64_t begin = first + task_.col_begin;
    if (Kernel::kScaledSums) scales_.fetch_rows(begin, columns_);
    for (int64_t tile = 0; tile < tiles_.count; ++tile) {
      const int64_t row = tiles_.begin(tile), rows = tiles_.size(tile);
      Sum* sums = sums_ + row * place_.sums_stride + target;
      for (int64_t c = 0; c < columns_; c += kQuantizedCols) {
        const int64_t n = min(kQuantizedCols, columns_ - c);
        const int64_t weight_row = begin + c;
        if constexpr (!Kernel::kScaledSums) {
          for (int64_t i = 0; i < n; ++i) {
            scales_.load_rows(weight_row + i, 1, Kernel::kUnit, scale_rows_ + i * place_.scale_stride);
          }
          scales_.fetch_rows(weight_row + kQuantizedCols, n);
        }
        multiply_panel<kTileRows>(weight_row, n, packed_ + row * row_size_, rows, sums + c);
      }
      for (int64_t r = 0; r < rows; ++r) {
        kernel().finish_sums(sums + r * place_.sums_stride, columns_, row + r, begin);
      }
    }
  }

  // What the kernel adds to the values of rows of T that multiply_columns has left there.
  template <class T>
  void add_outliers(int64_t, int64_t) {}

 protected:
  // row_size: elements of a packed row.
  QuantizedProduct(const QuantizedGemmParams& params, const GemmTask& task, const QuantizedScratch& place,
                   int64_t row_size, char* scratch)
      : p_(params.gemm),
        task_(task),
        tiles_(task.row_end - task.row_begin, kTileRows),
        scales_(params, task.expert),
        place_(place),
        columns_(task.col_end - task.col_begin),
        matrix_(static_cast<const uint8_t*>(params.weight.codes) + task.expert * params.weight.codes_stride),
        row_bytes_(p_.in_features * Codes::kBlockBytes / kBlockWeights),
        row_size_(row_size),
        packed_(reinterpret_cast<Packed*>(scratch)),
        scale_rows_(reinterpret_cast<float*>(scratch + place.scales)),
        sums_(reinterpret_cast<Sum*>(scratch + place.sums)),
        blocks_(p_.in_features / kBlockWeights),
        group_shift_(scales_.group_shift()) {
    for (int lane = 0; lane < kLanes; ++lane) {
      group_of_lane_[lane] = uint32_t(int64_t{Codes::kLaneWeights} * lane >> group_shift_);
    }
    // Of the last block a part may lie behind the row: its sums are zero, and scales must be numbers.
    for (int i = 0; i < kQuantizedCols; ++i) {
      for (int64_t k = scales_.per_row(); k < place.scale_stride; ++k) scale_rows_[i * place.scale_stride + k] = 0.0f;
    }
  }

  Packed* tile_at(int64_t tile) const { return packed_ + tiles_.begin(tile) * row_size_; }
  const uint8_t* codes_of(int64_t weight_row) const { return matrix_ + weight_row * row_bytes_; }
  float* values_of(int64_t row) const { return reinterpret_cast<float*>(sums_ + row * place_.sums_stride); }

  // What each lane is multiplied with in a block; `scales` are those of the weight row.
  MOEKERNELS_INLINE VecF scales_of_lanes(const float* scales, int64_t block) const {
    return permute_lanes(load(scales + (block * kBlockWeights >> group_shift_)), group_of_lane_);
  }

  const GroupedGemmParams& p_;
  const GemmTask& task_;
  const Parts tiles_;  // of the rows
  const QuantizedScales scales_;
  const QuantizedScratch& place_;
  const int64_t columns_;
  const uint8_t* const matrix_;  // codes of the expert

 private:
  const Kernel& kernel() const { return static_cast<const Kernel&>(*this); }

  // A tile x of `rows` <= kRows rows times n <= kQuantizedCols weight rows.
  template <int kRows>
  void multiply_panel(int64_t weight_row, int64_t n, const Packed* x, int64_t rows, Sum* sums) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return multiply_panel<kRows - 1>(weight_row, n, x, rows, sums);
    }
    constexpr int kCols = Kernel::template kCols<kRows>;
    int64_t c = 0;
    for (; c + kCols <= n; c += kCols) multiply<kCols, kRows>(weight_row + c, c, x, sums + c);
    for (; c < n; ++c) multiply<1, kRows>(weight_row + c, c, x, sums + c);
  }

  template <int kCols, int kRows>
  void multiply(int64_t weight_row, int64_t scale_row, const Packed* x, Sum* sums) {
    const uint8_t* weight[kCols];
    const float* scales[kCols];
    Total totals[kCols * kRows] = {};
    MOEKERNELS_UNROLL
    for (int c = 0; c < kCols; ++c) {
      weight[c] = codes_of(weight_row + c);
      scales[c] = scale_rows_ + (scale_row + c) * place_.scale_stride;
    }
    // Codes of weight rows to come, in the order of memory, which is that of no one of these.
    const uint8_t* next = weight[0] + round_up(kBytesAhead, kQuantizedCols * row_bytes_);
    for (int64_t block = 0; block < blocks_; ++block, x += kRows * kPackedBlock) {
      fetch_ahead(next, kCols * Codes::kBlockBytes);
      next += kCols * Codes::kBlockBytes;
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
    store_sums<kCols, kRows>(totals, sums);
  }

  // Four at a time, which changes none.
  template <int kCols, int kRows>
  MOEKERNELS_INLINE void store_sums(const Total (&totals)[kCols * kRows], Sum* target) {
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
        if (at < kTotals) target[at / kCols * place_.sums_stride + at % kCols] = sums[i];
      }
    }
  }

  const int64_t row_bytes_;  // of codes
  const int64_t row_size_;
  Packed* const packed_;
  float* const scale_rows_;
  Sum* const sums_;
  const int64_t blocks_;  // whole ones of a row
  const int group_shift_;
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
  product.template add_outliers<T>(0, 0);
  if (p.gated) {
    product.multiply_columns(p.out_features / 2, place.width);
    product.template add_outliers<T>(p.out_features / 2, place.width);
  }
  finish_rows<T>(p, task, place.width, place.sums_stride, reinterpret_cast<float*>(scratch + place.sums));
}

}  // namespace
}  // namespace moekernels::cpu
