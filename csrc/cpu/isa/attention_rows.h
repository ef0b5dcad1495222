// Where the rows of an attention task lie. Like simd.h, included only by what is compiled once per instruction set.
#pragma once

#include "cpu/isa/parts.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

// A row is a query. Rows count the queries of a head, then the heads that share a key, then the rows of the batch that
// do.
template <class T>
class AttentionRows {
 public:
  struct Row {
    const T* query;
    const T* bias;  // null if there is none
    T* out;
  };

  AttentionRows(const AttentionParams& params, const AttentionTask& task) : p_(params), task_(task) {}

  int64_t size() const { return task_.row_end - task_.row_begin; }

  // Rows begin .. begin + n of the task.
  void get(int64_t begin, int64_t n, Row* rows) const {
    const int64_t heads = p_.num_heads / p_.num_key_heads;
    const int64_t shared = p_.batch_size / p_.key_batch_size;
    const int64_t first = task_.row_begin + begin;
    int64_t query = first % p_.num_queries;
    int64_t head = first / p_.num_queries % heads;
    int64_t batch = task_.key_batch * shared + first / p_.num_queries / heads;
    for (int64_t i = 0; i < n; ++i) {
      rows[i] = row(batch, task_.key_head * heads + head, query);
      if (++query < p_.num_queries) continue;
      query = 0;
      if (++head < heads) continue;
      head = 0;
      ++batch;
    }
  }

  const T* key(int64_t key) const { return at(p_.key, p_.key_strides, task_.key_batch, task_.key_head, key); }
  const T* value(int64_t key) const { return at(p_.value, p_.value_strides, task_.key_batch, task_.key_head, key); }

 private:
  Row row(int64_t batch, int64_t head, int64_t query) const {
    const T* bias = nullptr;
    if (p_.bias != nullptr) {
      // A bias of one row per row of keys; others are as many as the queries, or broadcast.
      const int64_t bias_batch = p_.bias_batch_size == p_.key_batch_size ? task_.key_batch : batch;
      bias = at(p_.bias, p_.bias_strides, bias_batch, head, query);
    }
    return {at(p_.query, p_.query_strides, batch, head, query), bias,
            static_cast<T*>(p_.out) + ((batch * p_.num_queries + query) * p_.num_heads + head) * p_.head_dim};
  }

  static const T* at(const void* tensor, const int64_t (&strides)[3], int64_t i, int64_t j, int64_t k) {
    return static_cast<const T*>(tensor) + i * strides[0] + j * strides[1] + k * strides[2];
  }

  const AttentionParams& p_;
  const AttentionTask& task_;
};

}  // namespace
}  // namespace moekernels::cpu
