// The four paths of the grouped GEMM as stand-ins that only note how they were called: for the tests of the choice
// between them (grouped_gemm.cu, tile_config.h).
#include <cstring>

#include "cuda/gemm/grouped_gemm.cuh"

namespace moekernels {
namespace {

constexpr int kMaxCalls = 64;

struct Call {
  int64_t path, config_path, first_expert, num_experts, first_bias;
};

Call calls[kMaxCalls];
int num_calls = 0;
GroupedGemmParams whole{};  // as the caller gave them

cudaError_t note(GemmPath path, const GroupedGemmParams& params, const TileConfig& config) {
  if (num_calls == kMaxCalls) return cudaErrorInvalidValue;
  const int64_t element = size_of(params.dtype);
  const auto distance = [&](const void* a, const void* b, int64_t stride) {
    return b == nullptr ? int64_t{-1}
                        : (static_cast<const char*>(a) - static_cast<const char*>(b)) / (stride * element);
  };
  calls[num_calls++] = {static_cast<int64_t>(path), static_cast<int64_t>(config.path),
                        distance(params.weight, whole.weight, params.weight_expert_stride), params.num_experts,
                        distance(params.bias, whole.bias, params.bias_stride)};
  return params.expert_offsets - whole.expert_offsets == calls[num_calls - 1].first_expert ? cudaSuccess
                                                                                           : cudaErrorUnknown;
}

}  // namespace

cudaError_t launch_grouped_gemm_f32(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t) {
  return note(GemmPath::kF32, params, config);
}
cudaError_t launch_grouped_gemm_sm80(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t) {
  return note(GemmPath::kSm80, params, config);
}
cudaError_t launch_grouped_gemm_sm90(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t) {
  return note(GemmPath::kSm90, params, config);
}
cudaError_t launch_grouped_gemm_decode(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t) {
  return note(GemmPath::kDecode, params, config);
}
}  // namespace moekernels

using namespace moekernels;

// Forgets all calls; pointers to come are told as distances from these.
extern "C" cudaError_t expect_calls(const void* weight, const void* bias, const int32_t* expert_offsets) {
  num_calls = 0;
  whole.weight = weight;
  whole.bias = bias;
  whole.expert_offsets = expert_offsets;
  return cudaSuccess;
}

// count [1], then path, path in the configuration, first expert, experts, first bias of each call.
extern "C" cudaError_t take_calls(int64_t* count, int64_t* fields) {
  *count = num_calls;
  std::memcpy(fields, calls, sizeof(Call) * static_cast<size_t>(num_calls));
  return cudaSuccess;
}

// problem: num_rows, out_features, in_features, num_experts, dtype, gated, gathered, aligned, allow_tf32,
// batch_invariant, compute_capability, sm_count, transposed -> path, tile_m, tile_n, tile_k, stages, group_m, cluster,
// in_turn; text: 128 bytes
extern "C" cudaError_t choose(const int64_t* problem, int64_t* chosen, char* text) {
  GemmProblem p{};
  p.num_rows = problem[0];
  p.out_features = problem[1];
  p.in_features = problem[2];
  p.num_experts = static_cast<int32_t>(problem[3]);
  p.dtype = static_cast<DType>(problem[4]);
  p.gated = problem[5] != 0;
  p.gathered = problem[6] != 0;
  p.aligned = problem[7] != 0;
  p.allow_tf32 = problem[8] != 0;
  p.batch_invariant = problem[9] != 0;
  p.compute_capability = static_cast<int>(problem[10]);
  p.sm_count = static_cast<int>(problem[11]);
  p.transposed = problem[12] != 0;
  const TileConfig c = choose_tile_config(p);
  const int64_t fields[] = {
      static_cast<int64_t>(c.path), c.tile_m, c.tile_n, c.tile_k, c.stages, c.group_m, c.cluster, c.in_turn};
  std::memcpy(chosen, fields, sizeof fields);
  std::strncpy(text, to_string(c).c_str(), 128);
  return cudaSuccess;
}
