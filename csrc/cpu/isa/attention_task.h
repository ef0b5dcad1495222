// Attention of a few queries: the rows of one task look at the same keys.
//
//   pack the rows                            into one tile of multiply_tile
//   for each 4 keys                          their products with all rows
//   scale, bias and softmax, row by row      float32 throughout
//   for each block of columns                sums over all keys in registers
//
// Every row is computed as if it were alone.
#pragma once

#include "cpu/isa/attention_rows.h"
#include "cpu/isa/gemm_pack.h"
#include "cpu/isa/vector_math.h"

namespace moekernels::cpu {
namespace {

// What a task needs: the packed rows, then their scores [rows][stride].
template <class Dot>
struct AttentionScratch {
  int64_t stride, scores, bytes;

  explicit AttentionScratch(const AttentionParams& p)
      : stride(round_up(p.num_keys > 0 ? p.num_keys : 1, kLanes)),
        scores(Dot::kTileRows * round_up(p.head_dim, Dot::kStep) * int64_t(sizeof(typename Dot::Packed))),
        bytes(scores + Dot::kTileRows * stride * int64_t(sizeof(float))) {}
};

template <class Dot>
class AttentionTaskRunner {
 public:
  using T = typename Dot::Weight;

  AttentionTaskRunner(const AttentionParams& params, const AttentionTask& task, void* memory)
      : p_(params),
        rows_(params, task),
        num_rows_(rows_.size()),
        scratch_(params),
        packed_(memory, num_rows_),
        scores_(reinterpret_cast<float*>(static_cast<char*>(memory) + scratch_.scores)) {}

  void run() {
    rows_.get(0, num_rows_, row_);
    multiply_keys();
    for (int64_t i = 0; i < num_rows_; ++i) factors_[i] = softmax(i);
    constexpr int64_t kBlock = kTileCols * kLanes;
    int64_t col = 0;
    for (; col + kBlock <= p_.head_dim; col += kBlock) add_values<true>(col);
    if (col < p_.head_dim) add_values<false>(col);
  }

 private:
  void multiply_keys() {
    packed_.pack([&](int64_t i) { return row_[i].query; }, p_.head_dim);
    TileOperands<Dot> t;
    t.sums_stride = scratch_.stride;
    for (int64_t key = 0; key < p_.num_keys; key += kTileCols) {
      t.sums = scores_ + key;
      for (int64_t k = 0; k < p_.head_dim; k += Dot::kChunk) {
        t.rows = packed_.at(0, k);
        t.n = min(Dot::kChunk, p_.head_dim - k);
        t.add = k > 0;
        for (int64_t c = 0; c < kTileCols; ++c) {
          t.weight[c] = rows_.key(min(key + c, p_.num_keys - 1)) + k;
        }
        multiply_tile<Dot, Prefetch::kNone>(num_rows_, t);
      }
    }
  }

  // Leaves e^(score - largest) of a row, and returns one over their sum.
  float softmax(int64_t i) {
    const T* bias = row_[i].bias;
    float* scores = scores_ + i * scratch_.stride;
    const VecF lowest = set1(-__builtin_inff());
    VecF largest = lowest;
    for (int64_t key = 0; key < p_.num_keys; key += kLanes) {
      const int64_t n = p_.num_keys - key;
      VecF x = p_.scale * load_n(scores + key, n);
      if (bias != nullptr) x += load_n(bias + key, n);
      if (n < kLanes) {
        for (int64_t lane = n; lane < kLanes; ++lane) x[lane] = lowest[0];
      }
      store(scores + key, x);
      largest = x > largest ? x : largest;
    }
    float top = largest[0];
    for (int lane = 1; lane < kLanes; ++lane) top = largest[lane] > top ? largest[lane] : top;
    VecF sums{};
    for (int64_t key = 0; key < p_.num_keys; key += kLanes) {
      const VecF x = exp(load(scores + key) - top);
      store(scores + key, x);
      const int64_t n = p_.num_keys - key;
      sums += n >= kLanes ? x : load_n(scores + key, n);
    }
    return p_.num_keys == 0 ? 0.0f : 1.0f / sum_of(sums);
  }

  template <bool kWhole, int kRows = Dot::kTileRows>
  void add_values(int64_t col) {
    if (num_rows_ == kRows) return add_values_of<kWhole, kRows>(col);
    if constexpr (kRows > 1) add_values<kWhole, kRows - 1>(col);
  }

  // Columns col .. col + 4 vectors of all rows, or what is left of them.
  template <bool kWhole, int kRows>
  void add_values_of(int64_t col) {
    const T* values = rows_.value(0) + col;
    const int64_t n = kWhole ? kTileCols * kLanes : p_.head_dim - col;
    VecF sums[kRows][kTileCols];
    MOEKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MOEKERNELS_UNROLL
      for (int c = 0; c < kTileCols; ++c) sums[r][c] = VecF{};
    }
    for (int64_t key = 0; key < p_.num_keys; ++key, values += p_.value_strides[2]) {
      MOEKERNELS_UNROLL
      for (int c = 0; c < kTileCols; ++c) {
        if (!kWhole && c * kLanes >= n) break;
        const VecF value = kWhole ? load(values + c * kLanes) : load_n(values + c * kLanes, n - c * kLanes);
        MOEKERNELS_UNROLL
        for (int r = 0; r < kRows; ++r) sums[r][c] = fma(set1(scores_[r * scratch_.stride + key]), value, sums[r][c]);
      }
    }
    MOEKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      T* out = row_[r].out + col;
      MOEKERNELS_UNROLL
      for (int c = 0; c < kTileCols; ++c) {
        if (!kWhole && c * kLanes >= n) break;
        store_n(out + c * kLanes, factors_[r] * sums[r][c], n - c * kLanes);
      }
    }
  }

  const AttentionParams& p_;
  const AttentionRows<T> rows_;
  const int64_t num_rows_;
  const AttentionScratch<Dot> scratch_;
  PackedRows<Dot> packed_;
  float* const scores_;
  typename AttentionRows<T>::Row row_[Dot::kTileRows];
  float factors_[Dot::kTileRows];
};

template <class Dot>
constexpr AttentionKernel attention_kernel() {
  return {
      .max_rows = Dot::kTileRows,
      .max_head_dim = INT64_MAX,
      .scratch_bytes = [](const AttentionParams& params) { return AttentionScratch<Dot>(params).bytes; },
      .run = [](const AttentionParams& params, const AttentionTask& task,
                void* memory) { AttentionTaskRunner<Dot>(params, task, memory).run(); },
  };
}

}  // namespace
}  // namespace moekernels::cpu
