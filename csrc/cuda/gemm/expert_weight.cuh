// The weight and the bias of one expert: part of a stack, or parts of their own whose rows follow one another.
//
// A table of parts reaches the entry in host memory. store_table has a kernel write it to the workspace from its own
// arguments: nothing is copied from host memory and nothing waits, so a graph can capture it. Kernels read it there,
// and of the pointers to host memory only whether they are null.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.cuh"
#include "moekernels/params.h"

namespace moekernels {

// What lies in the workspace, once for each of the E * P parts.
struct TableEntry {
  WeightPart weight;
  const void* bias;
};

__host__ __device__ inline bool has_table(const GroupedGemmParams& p) {
  return p.weight_parts != nullptr || p.bias_parts != nullptr;
}

inline int64_t table_bytes(const GroupedGemmParams& p) {
  return has_table(p) ? int64_t{p.num_experts} * p.num_parts * static_cast<int64_t>(sizeof(TableEntry)) : 0;
}

// Enqueues the writing of the table, if there is one.
cudaError_t store_table(const GroupedGemmParams& params, cudaStream_t stream);

__device__ __forceinline__ const TableEntry* table_of(const GroupedGemmParams& p, int32_t expert) {
  return static_cast<const TableEntry*>(p.workspace) + static_cast<int64_t>(expert) * p.num_parts;
}

// Kernels without registers to spare serve stacks alone: kTables is false.
template <class T, bool kTables>
class ExpertWeight {
 public:
  __device__ __forceinline__ ExpertWeight(const GroupedGemmParams& p, int32_t expert) {
    if (p.weight_parts == nullptr) {
      first_ = static_cast<const T*>(p.weight) + expert * p.weight_expert_stride;
      stride_ = p.weight_row_stride;
      return;
    }
    parts_ = table_of(p, expert);
    first_ = static_cast<const T*>(parts_->weight.data);
    stride_ = parts_->weight.row_stride;
    part_rows_ = static_cast<int32_t>(p.transposed ? p.in_features : p.out_features) / p.num_parts;
    if (p.num_parts == 1) parts_ = nullptr;
  }

  __device__ __forceinline__ const T* row(int64_t row) const {
    if (parts_ == nullptr) return first_ + row * stride_;
    const auto i = static_cast<int32_t>(row);
    const WeightPart part = parts_[i / part_rows_].weight;
    return static_cast<const T*>(part.data) + i % part_rows_ * part.row_stride;
  }

  // Some address of the weight, aligned as all of its rows are.
  __device__ __forceinline__ const T* any() const { return first_; }

 private:
  const T* first_;
  int64_t stride_;
  const TableEntry* parts_ = nullptr;  // null: one part
  int32_t part_rows_ = 0;
};

// The bias in float32; zero where there is none. `feature` counts weight rows: values start at F.
template <class T, bool kTables>
class Bias {
 public:
  __device__ __forceinline__ Bias(const GroupedGemmParams& p, int32_t expert) {
    if (p.bias_parts != nullptr) {
      parts_ = table_of(p, expert);
      first_ = static_cast<const T*>(parts_->bias);
      part_rows_ = static_cast<int32_t>(p.out_features) / p.num_parts;
      if (p.num_parts == 1) parts_ = nullptr;
    } else if (p.bias != nullptr) {
      first_ = static_cast<const T*>(p.bias) + expert * p.bias_stride;
    }
  }

  __device__ __forceinline__ float operator[](int64_t feature) const {
    if (first_ == nullptr) return 0.0f;
    if (parts_ == nullptr) return to_float(first_[feature]);
    const auto row = static_cast<int32_t>(feature);
    return to_float(static_cast<const T*>(parts_[row / part_rows_].bias)[row % part_rows_]);
  }

 private:
  const T* first_ = nullptr;
  const TableEntry* parts_ = nullptr;  // null: one part
  int32_t part_rows_ = 0;
};

template <class T>
class ExpertWeight<T, false> {
 public:
  __device__ __forceinline__ ExpertWeight(const GroupedGemmParams& p, int32_t expert)
      : first_(static_cast<const T*>(p.weight) + expert * p.weight_expert_stride), stride_(p.weight_row_stride) {}
  __device__ __forceinline__ const T* row(int64_t row) const { return first_ + row * stride_; }
  __device__ __forceinline__ const T* any() const { return first_; }

 private:
  const T* first_;
  int64_t stride_;
};

template <class T>
class Bias<T, false> {
 public:
  __device__ __forceinline__ Bias(const GroupedGemmParams& p, int32_t expert)
      : first_(p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + expert * p.bias_stride) {}
  __device__ __forceinline__ float operator[](int64_t feature) const {
    return first_ == nullptr ? 0.0f : to_float(first_[feature]);
  }

 private:
  const T* first_;
};

// Stands in for rows that are not there.
template <class T, bool kTables>
__device__ __forceinline__ const T* readable_weight(const GroupedGemmParams& p, int32_t expert) {
  if constexpr (kTables) {
    return ExpertWeight<T, true>(p, expert).any();
  } else {
    return static_cast<const T*>(p.weight);
  }
}

}  // namespace moekernels
