#include <vector>

#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

// input [..., H], weight [H] -> [..., H]
Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps) {
  const Checks check("rms_norm", "input", input);
  check.that(input.dim() >= 1, "input must have at least 1 dimension [..., hidden_size], got 0");
  RmsNormParams params{};
  params.dtype = check.floating("input", input);
  params.hidden_size = input.size(input.dim() - 1);
  check.shape("weight", weight, {params.hidden_size}, "[hidden_size]");
  check.same_dtype("weight", weight);
  check.same_device("weight", weight);
  std::vector<int64_t> sizes;
  params.num_rows = 1;
  for (int64_t i = 0; i < input.dim(); ++i) sizes.push_back(input.size(i));
  for (int64_t i = 0; i + 1 < input.dim(); ++i) params.num_rows *= input.size(i);
  Tensor out = moekernels::new_empty(input, sizes);  // and not torch::stable's
  if (out.numel() == 0) return out;

  const Tensor source = dense(input);
  const Tensor dense_weight = dense(weight);
  params.input = source.data_ptr();
  params.weight = dense_weight.data_ptr();
  params.out = out.mutable_data_ptr();
  params.eps = static_cast<float>(eps);
  launch(params, input);
  return out;
}

}  // namespace moekernels
