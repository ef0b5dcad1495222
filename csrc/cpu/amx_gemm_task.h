// One task of the grouped GEMM in bfloat16 by tile registers.
//
// A weight row lies along K, so weights are the left operand straight from memory, and only the few rows of the task
// are packed, as the right one: sums come out as [columns][rows] and are transposed when they are finished. A
// transposed weight lies across K and is packed as the right operand instead, with the rows on the left.
#pragma once

#include "amx_product.h"
#include "gathered_rows.h"
#include "gemm_epilogue.h"
#include "kernel_table.h"

namespace moekernels::cpu {
namespace {

class AmxGemmTaskRunner {
 public:
  AmxGemmTaskRunner(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task, void* scratch)
      : p_(params),
        blocking_(blocking),
        task_(task),
        weight_(static_cast<const BFloat16*>(params.weight) + task.expert * params.weight_expert_stride),
        source_(params.rows, params.row_stride, params.token_of_row, params.num_source_rows),
        epilogue_(params, task.expert),
        rows_(scratch),
        sums_(reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset)),
        num_rows_(task.row_end - task.row_begin),
        row_groups_(groups_of(num_rows_)),
        pack_once_(params.in_features <= blocking.depth) {}

  void run() {
    const AmxTiles tiles;
    if (pack_once_) pack(0, p_.in_features);
    for (Columns cols = columns_at(task_.col_begin); cols.count > 0; cols = columns_at(cols.begin + cols.count)) {
      if (p_.in_features == 0) clear_sums(sums_, cols.num_groups * row_groups_);
      for (int64_t k = 0; k < p_.in_features; k += blocking_.depth) {
        const int64_t n = smaller(blocking_.depth, p_.in_features - k);
        if (!pack_once_) pack(k, n);
        multiply(cols, k, n);
      }
      finish(cols);
    }
  }

 private:
  // A block of output columns; none are left when count is 0.
  struct Columns {
    int64_t begin, count;
    int64_t groups;      // of 16 columns
    int64_t num_groups;  // twice that when gated: the gate's groups, then the value's
  };

  // 16 weight rows, or what is left of them.
  struct Group {
    const BFloat16* weight;
    int64_t rows;
  };

  Columns columns_at(int64_t begin) const {
    Columns cols;
    cols.begin = begin;
    cols.count = smaller(blocking_.cols, task_.col_end - begin);
    cols.groups = groups_of(cols.count);
    cols.num_groups = p_.gated ? 2 * cols.groups : cols.groups;
    return cols;
  }

  Group group_at(const Columns& cols, int64_t group, int64_t k) const {
    const bool value = group >= cols.groups;
    const int64_t first = (value ? group - cols.groups : group) * kAmxRows;
    const int64_t row = cols.begin + first + (value ? p_.out_features / 2 : 0);
    return {weight_ + row * p_.weight_row_stride + k, smaller(kAmxRows, cols.count - first)};
  }

  void pack(int64_t k, int64_t n) {
    rows_.pack_right(num_rows_, n, [&](int64_t row) { return source_.at(task_.row_begin + row, k); });
  }

  void multiply(const Columns& cols, int64_t k_begin, int64_t depth) {
    BFloat16 edges[2][kAmxRows * kAmxChunk];
    for (int64_t group = 0; group < cols.num_groups; group += 2) {
      const int64_t lefts = smaller(2, cols.num_groups - group);
      for (int64_t k = 0; k < depth; k += kAmxChunk) {
        const int64_t n = smaller(kAmxChunk, depth - k);
        AmxLeft left[2] = {};
        for (int64_t l = 0; l < lefts; ++l) {
          left[l] = left_operand(group_at(cols, group + l, k_begin + k), n, edges[l]);
        }
        for (int64_t right = 0; right < row_groups_; right += 2) {
          const int64_t rights = smaller(2, row_groups_ - right);
          const BFloat16* packed[2] = {rows_.at(right, k / kAmxDepth), rows_.at(right + rights - 1, k / kAmxDepth)};
          multiply_tiles(lefts, rights, left, packed, groups_of(n, kAmxDepth),
                         sums_ + (group * row_groups_ + right) * kAmxSums, row_groups_ * kAmxSums, k_begin + k > 0);
        }
      }
    }
  }

  // The weights where they are, or, where a tile would reach beyond them, a copy with zeros around.
  AmxLeft left_operand(const Group& group, int64_t n, BFloat16* edge) const {
    if (group.rows == kAmxRows && n % kAmxDepth == 0) return {group.weight, p_.weight_row_stride, kAmxDepth};
    AmxPacked copy(edge);
    copy.pack_left(group.rows, n, [&](int64_t row) { return group.weight + row * p_.weight_row_stride; });
    return {edge, kAmxDepth, kAmxElements};
  }

  void finish(const Columns& cols) const {
    for (int64_t group = 0; group < cols.groups; ++group) {
      const int64_t column = group * kAmxRows;
      for (int64_t row_group = 0; row_group < row_groups_; ++row_group) {
        VecU sums[kAmxRows], values[kAmxRows] = {};
        load_transposed(group, row_group, sums);
        if (p_.gated) load_transposed(cols.groups + group, row_group, values);
        const int64_t first = row_group * kAmxRows;
        for (int64_t row = 0; row < smaller(kAmxRows, num_rows_ - first); ++row) {
          epilogue_.store(task_.row_begin + first + row, cols.begin + column, cols.count - column, VecF(sums[row]),
                          VecF(values[row]));
        }
      }
    }
  }

  MOEKERNELS_INLINE void load_transposed(int64_t group, int64_t row_group, VecU (&v)[kAmxRows]) const {
    const float* tile = sums_ + (group * row_groups_ + row_group) * kAmxSums;
    MOEKERNELS_UNROLL
    for (int i = 0; i < kAmxRows; ++i) v[i] = VecU(load(tile + i * kAmxRows));
    transpose(v);
  }

  const GroupedGemmParams& p_;
  const GemmBlocking& blocking_;
  const GemmTask& task_;
  const BFloat16* const weight_;
  const GatheredRows<BFloat16> source_;
  const GemmEpilogue<BFloat16> epilogue_;
  AmxPacked rows_;
  float* const sums_;  // [groups of columns][groups of rows] tiles of the current columns
  const int64_t num_rows_, row_groups_;
  const bool pack_once_;
};

void run_amx_transposed_gemm_task(const GroupedGemmParams& p, const GemmBlocking& blocking, const GemmTask& task,
                                  void* scratch) {
  const GatheredRows<BFloat16> rows(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
  const BFloat16* weight = static_cast<const BFloat16*>(p.weight) + task.expert * p.weight_expert_stride;
  const GemmEpilogue<BFloat16> epilogue(p, task.expert);
  amx_product(
      blocking, scratch, task.row_end - task.row_begin, p.in_features, task.col_begin, task.col_end,
      [&](AmxPacked& left, int64_t num_rows, int64_t k, int64_t n) {
        left.pack_left(num_rows, n, [&](int64_t row) { return rows.at(task.row_begin + row, k); });
      },
      [&](int64_t k, int64_t col) { return weight + k * p.weight_row_stride + col; },
      [&](int64_t row, int64_t col, int64_t n, VecF low, VecF high) {
        epilogue.store(task.row_begin + row, col, n, low, VecF{});
        if (n > kLanes) epilogue.store(task.row_begin + row, col + kLanes, n - kLanes, high, VecF{});
      });
}

void run_amx_gemm_task(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task,
                       void* scratch) {
  AmxGemmTaskRunner(params, blocking, task, scratch).run();
}

}  // namespace
}  // namespace moekernels::cpu
