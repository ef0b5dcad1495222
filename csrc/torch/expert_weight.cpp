#include "expert_weight.h"

namespace moekernels {
namespace {

// The tensor itself, or a dense copy that lives as long as `copies`.
const Tensor& with_dense_rows(const Tensor& tensor, std::vector<Tensor>& copies) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1) return tensor;
  copies.push_back(dense_rows(tensor));
  return copies.back();
}

// Every part has the dtype and the device of the op's first tensor, and the shape of the first part.
void check_parts(const Checks& check, const char* name, const std::vector<Tensor>& tensors,
                 std::initializer_list<int64_t> sizes, const char* shape) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& part = tensors[i];
    bool is_right = part.dim() == static_cast<int64_t>(sizes.size()) && check.is_like_first(part);
    for (int64_t d = 0; is_right && d < part.dim(); ++d) is_right = part.size(d) == sizes.begin()[d];
    if (is_right) continue;
    const std::string part_name = std::string(name) + "[" + std::to_string(i) + "]";
    check.shape(part_name.c_str(), part, sizes, shape);
    check.same_dtype(part_name.c_str(), part);
    check.same_device(part_name.c_str(), part);
  }
}

}  // namespace

ExpertWeight::ExpertWeight(const Checks& check, const char* name, const std::vector<Tensor>& tensors,
                           int64_t num_experts, const char* shape)
    : name_(name), tensors_(tensors) {
  const auto count = static_cast<int64_t>(tensors.size());
  check.that(count >= 1, name, " must be one stack ", shape, " or a sequence of matrices, got an empty sequence");
  is_stack_ = count == 1 && (tensors[0].dim() != 2 || num_experts != 1);
  if (is_stack_) {
    check.rank(name, tensors[0], 3, shape);
    check.same_dtype(name, tensors[0]);
    check.same_device(name, tensors[0]);
    num_experts_ = tensors[0].size(0);
    num_parts_ = 1;
    rows_ = tensors[0].size(1);
    columns_ = tensors[0].size(2);
    check.that(num_experts_ >= 1 && num_experts_ <= INT32_MAX - 1, name, " must have at least 1 expert, got ",
               num_experts_);
    return;
  }
  num_experts_ = num_experts;
  check.that(num_experts >= 1 && num_experts <= INT32_MAX - 1,
             "expert_offsets must have at least 2 elements, for 1 expert, got ", num_experts + 1);
  check.that(count % num_experts == 0, name, " must have as many matrices for each of the ", num_experts,
             " experts, got ", count);
  num_parts_ = count / num_experts;
  check.that(tensors[0].dim() == 2, name, "[0] must have 2 dimensions, as one of several matrices, got ",
             tensors[0].dim());
  rows_ = num_parts_ * tensors[0].size(0);
  columns_ = tensors[0].size(1);
  check_parts(check, name, tensors, {tensors[0].size(0), columns_}, "of the first one");
}

void ExpertWeight::check_gated(const Checks& check) const {
  check.that(rows_ % 2 == 0, "a gated ", name_, " holds gate and value, so its out_features must be even, got ", rows_);
  check.that(num_parts_ == 1 || num_parts_ % 2 == 0, "a gated ", name_,
             " must have 1 or an even number of matrices for each expert, got ", num_parts_);
}

void ExpertWeight::set(GroupedGemmParams& params) {
  params.num_experts = static_cast<int32_t>(num_experts_);
  params.num_parts = static_cast<int32_t>(num_parts_);
  copies_.reserve(tensors_.size());
  if (is_stack_) {
    const Tensor& stack = with_dense_rows(tensors_[0], copies_);
    params.weight = stack.data_ptr();
    params.weight_expert_stride = stack.stride(0);
    params.weight_row_stride = stack.stride(1);
    return;
  }
  parts_.reserve(tensors_.size());
  for (const Tensor& tensor : tensors_) {
    const Tensor& part = with_dense_rows(tensor, copies_);
    parts_.push_back({part.data_ptr(), part.stride(0)});
  }
  params.weight_parts = parts_.data();
}

ExpertBias::ExpertBias(const Checks& check, const char* name, const std::vector<Tensor>& tensors,
                       const ExpertWeight& weight, bool transposed)
    : tensors_(tensors) {
  if (tensors.empty()) return;
  check.that(!transposed || tensors.size() == 1, name,
             " of a transposed weight must be one stack [num_experts, out_features], got ", tensors.size(), " vectors");
  if (transposed || (tensors.size() == 1 && tensors[0].dim() != 1)) {
    const int64_t out_features = transposed ? weight.columns() : weight.rows();
    check.shape(name, tensors[0], {weight.num_experts(), out_features}, "[num_experts, out_features]");
    check.same_dtype(name, tensors[0]);
    check.same_device(name, tensors[0]);
    return;
  }
  const int64_t expected = weight.num_experts() * weight.num_parts();
  check.that(static_cast<int64_t>(tensors.size()) == expected, name,
             " must be one stack [num_experts, out_features] or ", expected, " vectors, as many as ", weight.name(),
             " has matrices, got ", tensors.size());
  check_parts(check, name, tensors, {weight.rows() / weight.num_parts()}, "[out_features of a matrix]");
}

void ExpertBias::set(GroupedGemmParams& params) {
  if (tensors_.empty()) return;
  copies_.reserve(tensors_.size());
  if (tensors_.size() == 1 && tensors_[0].dim() == 2) {
    const Tensor& stack = with_dense_rows(tensors_[0], copies_);
    params.bias = stack.data_ptr();
    params.bias_stride = stack.stride(0);
    return;
  }
  parts_.reserve(tensors_.size());
  for (const Tensor& tensor : tensors_) parts_.push_back(with_dense_rows(tensor, copies_).data_ptr());
  params.bias_parts = parts_.data();
}

}  // namespace moekernels
