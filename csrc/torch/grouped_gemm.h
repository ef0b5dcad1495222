// The grouped GEMM as ops are made of it: under the checks of the op that was called, and with its names.
#pragma once

#include <optional>
#include <string>

#include "checks.h"
#include "expert_weight.h"

namespace moekernels {

struct GemmInputs {
  const Tensor& rows;
  ExpertWeight& weight;
  ExpertBias& bias;
  const Tensor& expert_offsets;
  std::optional<Tensor> token_of_row;
  std::optional<Tensor> row_scale;
  std::string activation = "none";
  bool gated = false;
  bool transposed = false;
  bool allow_tf32 = false;
  bool batch_invariant = false;
  const char* rows_name = "rows";
};

Tensor grouped_gemm(const Checks& check, const GemmInputs& in);

// E of offsets [E + 1].
int64_t experts_of(const Checks& check, const Tensor& expert_offsets);

}  // namespace moekernels
