// One task of the grouped GEMM in bfloat16 by tile registers.
//
// A weight is K-major, so weights are the left operand straight from memory, and only the few rows of the task
// are packed, as the right one: sums come out as [columns][rows] and are transposed when they are finished. A
// transposed weight is MN-major and is packed as the right operand instead, with the rows on the left.
//
// The weights come from memory once, and how they do decides the speed. A tile takes every second weight row: the
// processor prefetches along one stream in a page, and weight rows of 2 KB share one. Few rows are multiplied all at
// once, over all of K (amx/few_rows.h). Of many the first ones read the weights chunk by chunk where they are; the
// others read a packed copy, as weight rows a power of two apart displace each other from the first-level cache, and
// fetch the next weight rows meanwhile.
#pragma once

#include "cpu/isa/amx/few_rows.h"
#include "cpu/isa/amx/product.h"
#include "cpu/isa/expert_weight.h"
#include "cpu/isa/gathered_rows.h"
#include "cpu/isa/gemm_epilogue.h"
#include "cpu/isa/non_temporal.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

class AmxGemmTaskRunner {
 public:
  AmxGemmTaskRunner(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task, void* scratch)
      : p_(params),
        blocking_(blocking),
        task_(task),
        weight_(params, task),
        source_(params.rows, params.row_stride, params.token_of_row, params.num_source_rows),
        epilogue_(params, task),
        rows_(scratch),
        sums_(reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset)),
        num_rows_(task.row_end - task.row_begin),
        row_groups_(groups_of(num_rows_)),
        pack_once_(params.in_features <= blocking.depth),
        non_temporal_(task.col_begin % kStrip == 0 &&
                      is_non_temporal(params.out, params.num_rows, epilogue_.width() * int64_t(sizeof(BFloat16)))) {}

  void run() {
    const AmxTiles tiles;
    if (pack_once_) pack(0, p_.in_features, task_.rows_packed);
    for (Columns cols = columns_at(task_.col_begin); cols.count > 0; cols = columns_at(cols.begin + cols.count)) {
      if (p_.in_features == 0) clear_sums(sums_, 2 * cols.pairs * row_groups_);
      for (int64_t k = 0; k < p_.in_features; k += blocking_.depth) {
        const int64_t n = min(blocking_.depth, p_.in_features - k);
        if (!pack_once_) pack(k, n, false);
        for (int64_t pair = 0; pair < cols.pairs; ++pair) {
          if (row_groups_ <= kAmxFewRowGroups) {
            multiply_by_few_rows(cols, pair, k, n);
          } else {
            multiply_by_many_rows(cols, pair, k, n);
          }
        }
      }
      for (int64_t row_group = 0; row_group < row_groups_; ++row_group) {
        for (int64_t column = 0; column < cols.count; column += kStrip) finish(cols, column, row_group);
      }
    }
    if (non_temporal_) _mm_sfence();
  }

 private:
  static constexpr int64_t kStrip = 2 * kAmxRows;  // a line of the output
  static_assert(kAmxMinCols / 2 % kStrip == 0);    // with which every task of a part begins

  // A block of output columns; none are left when count is 0. Two strips of 32 weight rows, neighbours, or a gate and
  // its value, are two pairs of groups.
  struct Columns {
    int64_t begin, count, pairs;
  };

  // Every second of the 32 weight rows of a strip, or what is left of them.
  struct Group {
    const BFloat16* weight;
    int64_t stride;  // between the rows
    int64_t rows;
  };

  Columns columns_at(int64_t begin) const {
    const int64_t of_two_pairs = p_.gated ? kStrip : 2 * kStrip;
    const int64_t count = min(pack_once_ ? of_two_pairs : blocking_.cols, task_.col_end - begin);
    return {begin, count, 2 * groups_of(count, of_two_pairs)};
  }

  Group group_at(const Columns& cols, int64_t pair, int64_t left, int64_t k) const {
    const int64_t first = (p_.gated ? pair / 2 : pair / 2 * 2 + left) * kStrip + pair % 2;
    const bool value = p_.gated && left == 1;
    return {weight_.row(cols.begin + first, value) + k, 2 * weight_.stride(value),
            min(kAmxRows, (cols.count - first + 1) / 2)};
  }

  // Of the next block where this one has no further pair.
  Group group_of_next_pair(const Columns& cols, int64_t pair, int64_t left, int64_t k) const {
    if (pair + 1 < cols.pairs) return group_at(cols, pair + 1, left, k);
    return group_at(columns_at(cols.begin + cols.count), 0, left, k);
  }

  float* sums_of(int64_t pair, int64_t left, int64_t row_group) const {
    return sums_ + ((2 * pair + left) * row_groups_ + row_group) * kAmxSums;
  }

  void pack(int64_t k, int64_t n, bool packed) {
    rows_.resize(n);
    if (packed) return;
    rows_.pack_right(num_rows_, n, [&](int64_t row) { return source_.at(task_.row_begin + row, k); });
  }

  // One group of weights after the other, each read once.
  void multiply_by_few_rows(const Columns& cols, int64_t pair, int64_t k_begin, int64_t depth) {
    alignas(64) BFloat16 copy[kAmxRows * kAmxChunk];
    for (int64_t left = 0; left < 2; ++left) {
      const Group group = group_at(cols, pair, left, k_begin);
      if (group.rows <= 0) return;
      const Group next = left == 0 ? group_at(cols, pair, 1, k_begin) : group_of_next_pair(cols, pair, 0, k_begin);
      const AmxLeft ahead = {next.rows == kAmxRows ? next.weight : nullptr, next.stride, kAmxDepth};
      for (int64_t k = 0, n; k < depth; k += n) {
        const bool in_place = group.rows == kAmxRows && depth - k >= kAmxDepth;
        n = in_place ? (depth - k) / kAmxDepth * kAmxDepth : min(kAmxChunk, depth - k);
        multiply_few_rows(row_groups_, left_operand(group, k, n, copy), rows_.at(0, k / kAmxDepth),
                          rows_.at(1, 0) - rows_.at(0, 0), groups_of(n, kAmxDepth), sums_of(pair, left, 0),
                          k_begin + k > 0, ahead);
      }
    }
  }

  // Two groups of weights at a time, a chunk of which stays in the first-level cache for all rows.
  void multiply_by_many_rows(const Columns& cols, int64_t pair, int64_t k_begin, int64_t depth) {
    alignas(64) BFloat16 copies[2][kAmxRows * kAmxChunk];
    Group groups[2];
    int64_t lefts = 0;
    while (lefts < 2 && (groups[lefts] = group_at(cols, pair, lefts, k_begin)).rows > 0) ++lefts;
    for (int64_t k = 0, n; lefts > 0 && k < depth; k += n) {
      n = min(kAmxChunk, depth - k);
      AmxLeft left[2] = {};
      for (int64_t l = 0; l < lefts; ++l) {
        left[l] = left_operand(groups[l], k, n, copies[l]);
        if (left[l].data != copies[l]) left[l].copy = copies[l];
      }
      for (int64_t right = 0; right < row_groups_; right += 2) {
        const int64_t rights = min(2, row_groups_ - right);
        const BFloat16* packed[2] = {rows_.at(right, k / kAmxDepth), rows_.at(right + rights - 1, k / kAmxDepth)};
        multiply_tiles(lefts, rights, left, packed, groups_of(n, kAmxDepth), sums_of(pair, 0, right),
                       row_groups_ * kAmxSums, k_begin + k > 0, rows_to_fetch(cols, pair, right / 2, k_begin + k));
        for (int64_t l = 0; l < lefts; ++l) {
          if (left[l].copy != nullptr) left[l] = left[l].of_copy();
        }
      }
    }
  }

  // The weights of the next pair that `step` fetches; the first one is busy with reading those of this pair.
  AmxFetch rows_to_fetch(const Columns& cols, int64_t pair, int64_t step, int64_t k) const {
    if (step == 0) return {};
    const int64_t row = (step - 1) * AmxFetch::kRows, left = row / kAmxRows;
    const Group group = group_of_next_pair(cols, pair, left, k);
    if (group.rows < kAmxRows) return {};
    return {group.weight + row % kAmxRows * group.stride, group.stride};
  }

  // The weights where they are, or, where a tile would reach beyond them, a copy with zeros around.
  AmxLeft left_operand(const Group& group, int64_t k, int64_t n, BFloat16* copy) const {
    if (group.rows == kAmxRows && n % kAmxDepth == 0) return {group.weight + k, group.stride, kAmxDepth};
    AmxPacked packed(copy);
    packed.pack_left(group.rows, n, [&](int64_t row) { return group.weight + k + row * group.stride; });
    return {copy, kAmxDepth, kAmxElements};
  }

  // A strip of columns of 16 rows. Sums lie along the rows: those of two columns become words of two elements, which
  // one transposition turns into whole lines of the output.
  void finish(const Columns& cols, int64_t column, int64_t row_group) const {
    const int64_t count = min(kStrip, cols.count - column);
    const int64_t row = task_.row_begin + row_group * kAmxRows;
    const int64_t num_rows = min(kAmxRows, task_.row_end - row);
    const int64_t strip = column / kStrip;
    const int64_t pair = p_.gated ? 2 * strip : strip / 2 * 2, left = p_.gated ? 0 : strip % 2;
    const float* even = sums_of(pair, left, row_group);
    const float* odd = sums_of(pair + 1, left, row_group);
    const int64_t value = p_.gated ? row_groups_ * kAmxSums : 0;
    const VecF scales = epilogue_.row_scales(row, num_rows);
    VecU words[kAmxRows];
    for (int64_t c = 0; c < count; c += 2, even += kAmxRows, odd += kAmxRows) {
      const int64_t at = cols.begin + column + c;
      const VecF low = epilogue_.column(at, load(even), load(even + value), scales);
      const VecF high = epilogue_.column(at + (c + 1 < count), load(odd), load(odd + value), scales);
      words[c / 2] = rounded_upper_halves(low) >> 16 | (rounded_upper_halves(high) & 0xffff0000u);
    }
    transpose(words);
    const __mmask32 mask = count < kStrip ? (1u << count) - 1 : ~0u;
    for (int64_t r = 0; r < num_rows; ++r) {
      BFloat16* target = epilogue_.out(row + r, cols.begin + column);
      if (non_temporal_ && count == kStrip) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target), (__m512i)words[r]);
      } else {
        _mm512_mask_storeu_epi16(target, mask, (__m512i)words[r]);
      }
    }
  }

  const GroupedGemmParams& p_;
  const GemmBlocking& blocking_;
  const GemmTask& task_;
  const TaskWeight<BFloat16> weight_;
  const GatheredRows<BFloat16> source_;
  const GemmEpilogue<BFloat16> epilogue_;
  AmxPacked rows_;
  float* const sums_;  // [pairs][2][groups of rows] tiles of the current columns
  const int64_t num_rows_, row_groups_;
  const bool pack_once_, non_temporal_;
};

void run_amx_transposed_gemm_task(const GroupedGemmParams& p, const GemmBlocking& blocking, const GemmTask& task,
                                  void* scratch) {
  const GatheredRows<BFloat16> rows(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
  const TransposedWeight<BFloat16> weight(p, task.expert);
  const GemmEpilogue<BFloat16> epilogue(p, task);
  amx_product(
      blocking, scratch, task.row_end - task.row_begin, p.in_features, task.col_begin, task.col_end,
      [&](AmxPacked& left, int64_t num_rows, int64_t k, int64_t n) {
        left.pack_left(num_rows, n, [&](int64_t row) { return rows.at(task.row_begin + row, k); });
      },
      [&](int64_t k, int64_t col) { return weight.row(k) + col; },
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
