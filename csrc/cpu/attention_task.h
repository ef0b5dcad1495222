// Attention of a few queries: the rows of one task look at the same keys.
//
//   pack the rows                            into one tile of multiply_tile
//   for each 4 keys                          their products with all rows
//   scale, bias and softmax, row by row      float32 throughout
//   for each block of columns                sums over all keys in registers
//
// Every row is computed as if it were alone.
#pragma once

#include "gemm_pack.h"
#include "kernel_table.h"
#include "vector_math.h"

namespace moekernels::cpu {
namespace {

template <class Dot>
class AttentionTaskRunner {
 public:
  using T = typename Dot::Weight;

  AttentionTaskRunner(const AttentionParams& params, const AttentionTask& task, const AttentionScratch& scratch,
                      void* memory)
      : p_(params),
        task_(task),
        num_rows_(task.row_end - task.row_begin),
        stride_(scratch.score_stride),
        rows_(memory, num_rows_),
        scores_(reinterpret_cast<float*>(static_cast<char*>(memory) + scratch.scores_offset)) {}

  void run() {
    for (int64_t row = 0; row < num_rows_; ++row) heads_[row] = head_of(task_.row_begin + row);
    multiply_keys();
    for (int64_t row = 0; row < num_rows_; ++row) factors_[row] = softmax(row);
    constexpr int64_t kBlock = kTileCols * kLanes;
    int64_t col = 0;
    for (; col + kBlock <= p_.head_dim; col += kBlock) add_values<true>(col);
    if (col < p_.head_dim) add_values<false>(col);
  }

 private:
  // The query that a row is.
  struct Head {
    int64_t batch, head, query;
  };

  // Rows count the queries of a head, then the heads that share a key, then the rows of the batch that do.
  Head head_of(int64_t row) const {
    const int64_t heads = p_.num_heads / p_.num_key_heads;
    const int64_t shared = p_.batch_size / p_.key_batch_size;
    return {task_.key_batch * shared + row / p_.num_queries / heads,
            task_.key_head * heads + row / p_.num_queries % heads, row % p_.num_queries};
  }

  static const T* at(const void* tensor, const int64_t (&strides)[3], int64_t i, int64_t j, int64_t k) {
    return static_cast<const T*>(tensor) + i * strides[0] + j * strides[1] + k * strides[2];
  }

  void multiply_keys() {
    rows_.pack(
        [&](int64_t row) {
          return at(p_.query, p_.query_strides, heads_[row].batch, heads_[row].head, heads_[row].query);
        },
        p_.head_dim);
    const T* keys = at(p_.key, p_.key_strides, task_.key_batch, task_.key_head, 0);
    TileOperands<Dot> t;
    t.sums_stride = stride_;
    for (int64_t key = 0; key < p_.num_keys; key += kTileCols) {
      t.sums = scores_ + key;
      for (int64_t k = 0; k < p_.head_dim; k += Dot::kChunk) {
        t.rows = rows_.at(0, k);
        t.n = smaller(Dot::kChunk, p_.head_dim - k);
        t.add = k > 0;
        for (int64_t c = 0; c < kTileCols; ++c) {
          t.weight[c] = keys + smaller(key + c, p_.num_keys - 1) * p_.key_strides[2] + k;
        }
        multiply_tile<Dot, Prefetch::kNone>(num_rows_, t);
      }
    }
  }

  // Leaves e^(score - largest) of a row, and returns one over their sum.
  float softmax(int64_t row) {
    const Head& h = heads_[row];
    const T* bias = nullptr;
    if (p_.bias != nullptr) {
      const int64_t batch = h.batch * p_.bias_batch_size / p_.batch_size;
      bias = at(p_.bias, p_.bias_strides, batch, h.head, h.query);
    }
    float* scores = scores_ + row * stride_;
    const VecF lowest = set1(-__builtin_inff());
    VecF largest = lowest;
    for (int64_t key = 0; key < p_.num_keys; key += kLanes) {
      const int64_t n = p_.num_keys - key;
      VecF x = p_.scale * load_n(scores + key, n);
      if (bias != nullptr) x += load_n(bias + key, n);
      if (n < kLanes) {
        for (int64_t i = n; i < kLanes; ++i) x[i] = lowest[0];
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

  template <bool kWhole>
  void add_values(int64_t col) {
    switch (num_rows_) {
      case 1:
        return add_values<kWhole, 1>(col);
      case 2:
        return add_values<kWhole, 2>(col);
#if MOEKERNELS_VECTOR_BYTES >= 32
      case 3:
        return add_values<kWhole, 3>(col);
#endif
#if MOEKERNELS_VECTOR_BYTES >= 64
      case 4:
        return add_values<kWhole, 4>(col);
      case 5:
        return add_values<kWhole, 5>(col);
      case 6:
        return add_values<kWhole, 6>(col);
#endif
    }
  }

  // Columns col .. col + 4 vectors of all rows, or what is left of them.
  template <bool kWhole, int kRows>
  void add_values(int64_t col) {
    const T* values = at(p_.value, p_.value_strides, task_.key_batch, task_.key_head, 0) + col;
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
        for (int r = 0; r < kRows; ++r) sums[r][c] = fma(set1(scores_[r * stride_ + key]), value, sums[r][c]);
      }
    }
    MOEKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Head& h = heads_[r];
      T* out =
          static_cast<T*>(p_.out) + ((h.batch * p_.num_queries + h.query) * p_.num_heads + h.head) * p_.head_dim + col;
      MOEKERNELS_UNROLL
      for (int c = 0; c < kTileCols; ++c) {
        if (!kWhole && c * kLanes >= n) break;
        store_n(out + c * kLanes, factors_[r] * sums[r][c], n - c * kLanes);
      }
    }
  }

  const AttentionParams& p_;
  const AttentionTask& task_;
  const int64_t num_rows_, stride_;
  PackedRows<Dot> rows_;
  float* const scores_;  // [rows][stride]
  Head heads_[kTileRows];
  float factors_[kTileRows];
};

template <class Dot>
void run_attention_task(const AttentionParams& params, const AttentionTask& task, const AttentionScratch& scratch,
                        void* memory) {
  AttentionTaskRunner<Dot>(params, task, scratch, memory).run();
}

}  // namespace
}  // namespace moekernels::cpu
