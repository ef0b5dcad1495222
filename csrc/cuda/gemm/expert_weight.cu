#include "cuda/gemm/expert_weight.cuh"

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/overlap.cuh"

namespace moekernels {
namespace {

constexpr int kEntries = 128;  // of one launch, whose arguments may have 4 KB

struct Entries {
  TableEntry values[kEntries];
};

__global__ void __launch_bounds__(kEntries)
    store_table_kernel(const __grid_constant__ Entries entries, TableEntry* table, int count) {
  begin_overlapped();
  const auto i = static_cast<int>(threadIdx.x);
  if (i < count) table[i] = entries.values[i];
}

}  // namespace

cudaError_t store_table(const GroupedGemmParams& params, cudaStream_t stream) {
  if (!has_table(params)) return cudaSuccess;
  const int64_t total = int64_t{params.num_experts} * params.num_parts;
  for (int64_t first = 0; first < total; first += kEntries) {
    const auto count = static_cast<int>(std::min<int64_t>(total - first, kEntries));
    Entries entries{};
    for (int i = 0; i < count; ++i) {
      if (params.weight_parts != nullptr) entries.values[i].weight = params.weight_parts[first + i];
      if (params.bias_parts != nullptr) entries.values[i].bias = params.bias_parts[first + i];
    }
    LaunchConfig config{dim3(1), dim3(kEntries), 0, stream};
    config.overlap_previous = can_overlap_previous<store_table_kernel>();
    TableEntry* const table = static_cast<TableEntry*>(params.workspace) + first;
    const cudaError_t error = launch<store_table_kernel>(config, entries, table, count);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace moekernels
