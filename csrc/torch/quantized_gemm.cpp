#include <torch/csrc/stable/ops.h>

#include <vector>

#include "allocate.h"
#include "checks.h"
#include "grouped_gemm.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {
namespace {

CodeOrder order_of(const Checks& check, const std::string& name) {
  if (name == "pairs") return CodeOrder::kPairs;
  if (name == "halves") return CodeOrder::kHalves;
  check.that(name == "bytes", "order must be pairs, halves or bytes; got '", name, "'");
  return CodeOrder::kBytes;
}

// That `tensor` [E, entries] of this dtype is there for all experts.
void check_part(const Checks& check, const char* name, const Tensor& tensor, ScalarType dtype, int64_t num_experts,
                int64_t entries) {
  check.that(tensor.dim() == 2 && tensor.size(0) == num_experts && tensor.size(1) == entries, name,
             " must have shape [", num_experts, ", ", entries, "]");
  check.dtype(name, tensor, dtype);
  check.same_device(name, tensor);
}

// From one row to the next; of a single one torch says something or other.
int64_t stride_of_rows(const Tensor& tensor) {
  return tensor.size(0) == 1 ? 0 : tensor.stride(0);
}

// A tensor of dense rows that start at multiples of 16 bytes, as kernels for GPUs read them: itself, or a copy, with
// something between its rows if need be.
Tensor aligned_rows(const Tensor& tensor, int64_t element_size) {
  const Tensor rows = dense_rows(tensor);
  if (reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0 && stride_of_rows(rows) * element_size % 16 == 0) {
    return rows;
  }
  const int64_t width = rows.size(1), vector = 16 / element_size;
  Tensor wide = moekernels::new_empty(rows, {rows.size(0), (width + vector - 1) / vector * vector});
  Tensor copy = torch::stable::narrow(wide, 1, 0, width);
  torch::stable::copy_(copy, rows);
  return copy;
}

constexpr int64_t kMostIntegers = 65536;  // whose products with codes of 8 bits add up to less than 2^31

}  // namespace

// rows [N, K], codes [E, entries], scales [E, M * K / group], expert_offsets [E + 1] -> [N, M], or [N, M / 2] gated
//
// `transposed`: the weight is [E, K, M], so that this is the gradient of the rows; on CUDA in 16 bits alone.
//
// `tables`: none, [16] values of 4-bit codes, or, where scales are codes themselves, also [256] their values and, for
// every 256 of them, [E, n] factors and [E, n] offsets.
Tensor quantized_gemm(const Tensor& rows, const Tensor& codes, const Tensor& scales, const std::vector<Tensor>& tables,
                      const std::string& order, int64_t group, double unit, int64_t out_features,
                      const Tensor& expert_offsets, const std::optional<Tensor>& bias, const std::string& activation,
                      bool gated, const std::optional<Tensor>& row_scale, const std::optional<Tensor>& token_of_row,
                      bool batch_invariant, bool int8_rows, double int8_threshold, bool transposed) {
  const Checks check("quantized_gemm", "rows", rows);
  check.rank("rows", rows, 2, "[num_rows, in_features]");
  QuantizedGemmParams params{};
  GroupedGemmParams& gemm = params.gemm;
  QuantizedWeightParams& weight = params.weight;
  gemm.dtype = check.floating("rows", rows);
  check.set_activation(gemm, activation, gated);
  check.that(gemm.activation != Activation::kSwiglu, "activation must be a name, got ", activation);
  const int64_t in_features = rows.size(1), num_experts = experts_of(check, expert_offsets);
  check.that(in_features > 0 && out_features > 0 && (!gated || out_features % 2 == 0),
             "the weight must not be empty, and have an even number of rows when gated");
  const bool on_gpu = rows.is_cuda();
  const int64_t columns = transposed ? out_features : in_features;
  check.that(!transposed || (on_gpu && gemm.dtype != DType::kFloat32 && !gated && !bias.has_value() &&
                             gemm.activation == Activation::kNone),
             "transposed goes with bfloat16 or float16 on CUDA, and with no bias, activation or gate");
  weight.order = order_of(check, order);
  const bool is_nibbles = weight.order != CodeOrder::kBytes;
  check.that(group == columns || (group >= 32 && (group & (group - 1)) == 0),
             "group must be in_features or a power of 2 from 32 on, got ", group);
  check.that(columns % group == 0 && (!is_nibbles || columns % 32 == 0), transposed ? "the weight" : "rows",
             " must have a multiple of the group of the weight in columns, ", group, ", got ", columns);
  if (token_of_row.has_value()) check.index("token_of_row", *token_of_row, 1, "[num_rows]");
  gemm.num_source_rows = rows.size(0);
  gemm.num_rows = token_of_row.has_value() ? token_of_row->size(0) : rows.size(0);
  check.expert_offsets(expert_offsets, num_experts, gemm.num_rows);
  const int64_t num_weights = out_features * in_features;
  const bool is_nested = tables.size() == 4;
  check_part(check, "codes", codes, is_nibbles ? ScalarType::Byte : ScalarType::Char, num_experts,
             is_nibbles ? num_weights / 2 : num_weights);
  const bool is_half = scales.scalar_type() == ScalarType::Half;
  const ScalarType plain = is_half ? ScalarType::Half : ScalarType::Float;
  check_part(check, "scales", scales, is_nested ? ScalarType::Byte : plain, num_experts, num_weights / group);
  check.that(tables.empty() || tables.size() == 1 || is_nested, "tables must be 0, 1 or 4, got ", tables.size());
  check.that(!int8_rows || (tables.empty() && weight.order != CodeOrder::kPairs),
             "rows are rounded to 8 bits only beside codes that are integers");
  check.that(!int8_rows || in_features <= kMostIntegers, "rows that are rounded to 8 bits must have at most ",
             kMostIntegers, " columns, got ", in_features);
  check.that(int8_threshold >= 0, "int8_threshold must be 0 or positive, got ", int8_threshold);
  check.that(int8_threshold == 0 || (int8_rows && !is_nibbles && group == in_features),
             "int8_threshold goes with int8_rows, codes in bytes and a scale for each row of the weight");
  params.int8_rows = int8_rows;
  params.int8_threshold = static_cast<float>(int8_threshold);
  check.that(!on_gpu || !int8_rows, "on CUDA rows are not rounded to 8 bits");
  check.that(!on_gpu || is_nibbles || columns % 16 == 0, "on CUDA ", transposed ? "the weight" : "rows",
             " must have a multiple of 16 columns beside codes of 8 bits, got ", columns);
  if (!tables.empty()) check.float_shape("tables[0]", tables[0], {16}, "[16]");
  if (is_nested) {
    check.float_shape("tables[1]", tables[1], {256}, "[256]");
    const int64_t entries = (num_weights / group + 255) / 256;
    check_part(check, "tables[2]", tables[2], ScalarType::Float, num_experts, entries);
    check_part(check, "tables[3]", tables[3], ScalarType::Float, num_experts, entries);
  }
  if (bias.has_value()) {
    check.shape("bias", *bias, {num_experts, out_features}, "[num_experts, out_features]");
    check.same_dtype("bias", *bias);
    check.same_device("bias", *bias);
  }
  if (row_scale.has_value()) check.float_shape("row_scale", *row_scale, {gemm.num_rows}, "[num_rows]");
  if (on_gpu && gemm.activation == Activation::kRelu2) {  // the epilogue has no registers for it
    check.that(!row_scale.has_value(), "row_scale goes with no relu2 on CUDA");
    return moekernels::activation(
        quantized_gemm(rows, codes, scales, tables, order, group, unit, out_features, expert_offsets, bias, "none",
                       false, std::nullopt, token_of_row, batch_invariant, int8_rows, int8_threshold, false),
        activation, gated);
  }
  Tensor out = moekernels::new_empty(rows, {gemm.num_rows, gated ? out_features / 2 : out_features});
  if (out.numel() == 0) return out;

  const Tensor source = on_gpu ? aligned_rows(rows, size_of(gemm.dtype)) : dense_rows(rows);
  const Tensor dense_codes = on_gpu ? aligned_rows(codes, 1) : dense_rows(codes);
  const Tensor offsets = dense(expert_offsets), dense_scales = dense_rows(scales);
  const std::optional<Tensor> dense_bias = dense_rows(bias), tokens = dense(token_of_row), factors = dense(row_scale);
  std::vector<Tensor> dense_tables;
  for (const Tensor& table : tables) dense_tables.push_back(dense(table));
  weight.codes = dense_codes.data_ptr();
  weight.scales = dense_scales.data_ptr();
  weight.codes_stride = stride_of_rows(dense_codes);
  weight.scales_stride = dense_scales.stride(0);
  weight.scales_dtype = is_half ? DType::kFloat16 : DType::kFloat32;
  weight.group = group;
  weight.unit = static_cast<float>(unit);
  if (!tables.empty()) weight.table = dense_tables[0].const_data_ptr<float>();
  if (is_nested) {
    weight.map = dense_tables[1].const_data_ptr<float>();
    weight.nested = dense_tables[2].const_data_ptr<float>();
    weight.offset = dense_tables[3].const_data_ptr<float>();
    weight.nested_stride = dense_tables[2].size(1);
  }
  gemm.rows = source.data_ptr();
  gemm.row_stride = stride_of_rows(source);
  gemm.token_of_row = tokens ? tokens->const_data_ptr<int32_t>() : nullptr;
  gemm.row_scale = factors ? factors->const_data_ptr<float>() : nullptr;
  gemm.expert_offsets = offsets.const_data_ptr<int32_t>();
  gemm.bias = dense_bias ? dense_bias->data_ptr() : nullptr;
  gemm.bias_stride = dense_bias ? dense_bias->stride(0) : 0;
  gemm.out = out.mutable_data_ptr();
  gemm.out_features = out_features;
  gemm.in_features = in_features;
  gemm.num_experts = static_cast<int32_t>(num_experts);
  gemm.transposed = transposed;
  gemm.batch_invariant = batch_invariant;
  launch(params, rows);
  return out;
}

}  // namespace moekernels
