// One MoE layer on raw pointers: no torch, no Python. Prints how far it is from the same layer in plain loops.
//
//   router logits -> route -> plan -> grouped GEMM up (gathers its rows) -> grouped GEMM down -> un-permute
//
// The memory is yours: every size is known beforehand, and a kernel that needs scratch memory asks you for it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "moekernels/cpu.h"

namespace {

constexpr int64_t kTokens = 37, kHidden = 64, kFfn = 48, kExperts = 8, kTopK = 2, kRows = kTokens * kTopK;

// What the kernels run on: threads, here new ones for every call, and scratch memory, here freed when the next kernel
// asks for some.
struct Resources {
  moekernels::Parallel parallel(int32_t num_threads) {
    const auto run = [](void*, int64_t num_tasks, moekernels::Parallel::Body body, void* context) {
      std::vector<std::thread> threads;
      for (int64_t task = 0; task < num_tasks; ++task) threads.emplace_back(body, context, task, task + 1);
      for (std::thread& thread : threads) thread.join();
    };
    const auto scratch = [](void* self, int64_t num_bytes) {
      auto& memory = static_cast<Resources*>(self)->memory;
      memory.reset(std::aligned_alloc(64, static_cast<size_t>((num_bytes + 63) / 64 * 64)));
      return memory.get();
    };
    return {run, scratch, this, num_threads};
  }

  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
};

std::vector<float> random_floats(int64_t n, float scale) {
  static std::mt19937 generator{7};
  std::normal_distribution<float> normal{0.0f, scale};
  std::vector<float> values(static_cast<size_t>(n));
  std::generate(values.begin(), values.end(), [&] { return normal(generator); });
  return values;
}

}  // namespace

int main() {
  using namespace moekernels;
  Resources resources;
  const Parallel parallel = resources.parallel(/*num_threads=*/2);
  const std::vector<float> hidden = random_floats(kTokens * kHidden, 1.0f);
  const std::vector<float> logits = random_floats(kTokens * kExperts, 1.0f);
  const std::vector<float> up = random_floats(kExperts * 2 * kFfn * kHidden, 0.1f);  // gate rows first, then values
  const std::vector<float> down = random_floats(kExperts * kHidden * kFfn, 0.1f);

  std::vector<float> weights(kRows);
  std::vector<int32_t> expert_ids(kRows);
  RouteParams route{};
  route.logits = logits.data();
  route.weights = weights.data();
  route.expert_ids = expert_ids.data();
  route.num_tokens = kTokens;
  route.logits_stride = kExperts;
  route.num_experts = kExperts;
  route.top_k = kTopK;
  run(route, parallel);

  std::vector<int32_t> expert_offsets(kExperts + 1), token_of_row(kRows), row_of_slot(kRows);
  PlanParams plan{};
  plan.expert_ids = expert_ids.data();
  plan.expert_offsets = expert_offsets.data();
  plan.token_of_row = token_of_row.data();
  plan.row_of_slot = row_of_slot.data();
  plan.num_tokens = kTokens;
  plan.capacity = -1;  // no limit
  plan.group_size = kTokens;
  plan.num_experts = kExperts;
  plan.top_k = kTopK;
  run(plan, parallel);

  std::vector<float> inner(kRows * kFfn), rows(kRows * kHidden), out(kTokens * kHidden);
  GroupedGemmParams gemm{};
  gemm.rows = hidden.data();
  gemm.token_of_row = token_of_row.data();
  gemm.weight = up.data();
  gemm.expert_offsets = expert_offsets.data();
  gemm.out = inner.data();
  gemm.num_rows = kRows;
  gemm.num_source_rows = kTokens;
  gemm.row_stride = kHidden;
  gemm.weight_expert_stride = 2 * kFfn * kHidden;
  gemm.weight_row_stride = kHidden;
  gemm.out_features = 2 * kFfn;
  gemm.in_features = kHidden;
  gemm.num_experts = kExperts;
  gemm.activation = Activation::kSilu;
  gemm.gated = true;
  run(gemm, parallel);

  gemm = {};
  gemm.rows = inner.data();
  gemm.weight = down.data();
  gemm.expert_offsets = expert_offsets.data();
  gemm.out = rows.data();
  gemm.num_rows = kRows;
  gemm.num_source_rows = kRows;
  gemm.row_stride = kFfn;
  gemm.weight_expert_stride = kHidden * kFfn;
  gemm.weight_row_stride = kFfn;
  gemm.out_features = kHidden;
  gemm.in_features = kFfn;
  gemm.num_experts = kExperts;
  run(gemm, parallel);

  UnpermuteParams unpermute{};
  unpermute.rows = rows.data();
  unpermute.row_of_slot = row_of_slot.data();
  unpermute.weights = weights.data();
  unpermute.out = out.data();
  unpermute.num_tokens = kTokens;
  unpermute.num_rows = kRows;
  unpermute.hidden_size = kHidden;
  unpermute.row_stride = kHidden;
  unpermute.top_k = kTopK;
  run(unpermute, parallel);

  double worst = 0.0;
  for (int64_t t = 0; t < kTokens; ++t) {
    std::vector<double> expected(kHidden, 0.0);
    for (int64_t k = 0; k < kTopK; ++k) {
      const int64_t e = expert_ids[t * kTopK + k];
      std::vector<double> a(kFfn);
      for (int64_t f = 0; f < kFfn; ++f) {
        double gate = 0.0, value = 0.0;
        for (int64_t h = 0; h < kHidden; ++h) {
          gate += double(hidden[t * kHidden + h]) * up[(e * 2 * kFfn + f) * kHidden + h];
          value += double(hidden[t * kHidden + h]) * up[(e * 2 * kFfn + kFfn + f) * kHidden + h];
        }
        a[f] = gate / (1.0 + std::exp(-gate)) * value;
      }
      for (int64_t h = 0; h < kHidden; ++h) {
        double y = 0.0;
        for (int64_t f = 0; f < kFfn; ++f) y += a[f] * down[(e * kHidden + h) * kFfn + f];
        expected[h] += weights[t * kTopK + k] * y;
      }
    }
    for (int64_t h = 0; h < kHidden; ++h) worst = std::max(worst, std::abs(expected[h] - out[t * kHidden + h]));
  }
  std::printf("%lld tokens through %lld experts (%s): largest error %.1e\n", static_cast<long long>(kTokens),
              static_cast<long long>(kExperts), name_of(current_cpu_isa()), worst);
  return worst < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;
}
