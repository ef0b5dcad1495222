// A launcher with the interface of moekernels/cuda.h, to test how the tests call launchers.
//
// `capacity` chooses what to do wrong: 1 writes an input, 2 writes past the workspace, 3 writes token_of_row even if it
// is null, 4 returns an error.
#include "cuda/common/launch.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

__global__ void plan_kernel(PlanParams params) {
  auto* workspace = static_cast<int32_t*>(params.workspace);
  for (int i = 0; i < params.num_experts; ++i) workspace[i] = i;
  if (params.capacity == 1) const_cast<int32_t*>(params.expert_ids)[0] = 0;
  if (params.capacity == 2) workspace[params.num_experts] = 0;
  if (params.capacity == 3) params.token_of_row[0] = 0;
  params.expert_offsets[0] = static_cast<int32_t>(params.num_tokens);
  params.expert_offsets[1] = params.num_experts;
  params.expert_offsets[2] = params.top_k;
  params.expert_offsets[3] = params.expert_ids[0];
}

}  // namespace

int64_t workspace_bytes(const PlanParams& params) {
  return params.num_experts * static_cast<int64_t>(sizeof(int32_t));
}

cudaError_t run(const PlanParams& params, cudaStream_t stream) {
  if (params.capacity == 4) return cudaErrorNotSupported;
  return launch<plan_kernel>({dim3(1), dim3(1), 0, stream}, params);
}

}  // namespace moekernels
