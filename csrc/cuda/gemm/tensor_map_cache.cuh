// Tensor maps that were made before. A map depends on nothing but its arguments (it holds an address, not what lies
// there), so an entry can never be out of date: it is only ever replaced by another.
#pragma once

#include <array>
#include <mutex>

#include "cuda/gemm/tensor_map.cuh"

namespace moekernels {

// make_tensor_map with the 128-byte swizzle, through a small cache.
inline cudaError_t cached_tensor_map(CUtensorMap* map, const TensorMapSource& source, int32_t box_columns,
                                     int32_t box_rows) {
  using Key = std::array<int64_t, 9>;
  struct Entry {
    Key key{};  // all zero: empty, as no map has zero columns
    CUtensorMap map{};
  };
  constexpr size_t kEntries = 256;
  static std::mutex mutex;
  static std::array<Entry, kEntries> entries;

  const Key key{reinterpret_cast<intptr_t>(source.data),
                static_cast<int64_t>(source.dtype),
                source.columns,
                source.rows,
                source.depth,
                source.row_stride,
                source.depth_stride,
                box_columns,
                box_rows};
  uint64_t hash = 0;
  for (const int64_t part : key) hash = (hash ^ static_cast<uint64_t>(part)) * 0x9E3779B97F4A7C15u;
  Entry& entry = entries[hash >> 56];
  static_assert(kEntries == 256, "the top eight bits of the hash choose an entry");

  const std::lock_guard<std::mutex> lock(mutex);
  if (entry.key != key) {
    CUtensorMap fresh;
    const cudaError_t error = make_tensor_map(&fresh, source, box_columns, box_rows);
    if (error != cudaSuccess) return error;
    entry = {key, fresh};
  }
  *map = entry.map;
  return cudaSuccess;
}

}  // namespace moekernels
