#include "checks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <sstream>
#include <string_view>
#include <utility>

namespace moekernels {
namespace {

std::string join(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

constexpr std::array<std::pair<const char*, Activation>, 6> kActivations = {{
    {"none", Activation::kNone},
    {"relu", Activation::kRelu},
    {"gelu", Activation::kGelu},
    {"gelu_tanh", Activation::kGeluTanh},
    {"silu", Activation::kSilu},
    {"relu2", Activation::kRelu2},
}};

constexpr std::array<std::pair<const char*, Scoring>, 3> kScorings = {{
    {"softmax", Scoring::kSoftmax},
    {"top2_gate", Scoring::kTop2Gate},
    {"sparsemixer", Scoring::kSparsemixer},
}};

constexpr std::array<std::pair<const char*, Score>, 3> kScores = {{
    {"softmax", Score::kSoftmax},
    {"sigmoid", Score::kSigmoid},
    {"sqrt_softplus", Score::kSqrtSoftplus},
}};

template <typename Table>
auto look_up(const Checks& checks, const char* what, const Table& table, const std::string& name) {
  for (const auto& [known_name, value] : table) {
    if (name == known_name) return value;
  }
  std::string known;
  for (const auto& entry : table) known += (known.empty() ? "" : ", ") + std::string(entry.first);
  checks.that(false, what, " must be one of ", known, "; got '", name, "'");
  return table[0].second;
}

// "swiglu(alpha,limit,shift,interleaved)", three numbers and 0 or 1, as Python writes them; false if it is not that.
bool parse_swiglu(const std::string& text, Swiglu& swiglu) {
  constexpr std::string_view kName = "swiglu(";
  if (text.compare(0, kName.size(), kName) != 0) return false;
  const char* at = text.data() + kName.size();
  const char* const end = text.data() + text.size();
  double values[4];
  for (int i = 0; i < 4; ++i) {
    const auto [next, error] = std::from_chars(at, end, values[i]);
    if (error != std::errc{} || next == end || *next != (i < 3 ? ',' : ')')) return false;
    at = next + 1;
  }
  swiglu = {static_cast<float>(values[0]), static_cast<float>(values[1]), static_cast<float>(values[2]),
            values[3] != 0.0};
  return at == end;
}

}  // namespace

std::string to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

void Checks::shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                   const char* shape) const {
  rank(name, tensor, static_cast<int64_t>(sizes.size()), shape);
  const torch::headeronly::IntHeaderOnlyArrayRef expected(sizes.begin(), sizes.size());
  const auto actual = tensor.sizes();
  if (std::equal(actual.begin(), actual.end(), expected.begin())) return;
  that(false, name, " must have shape ", shape, " = ", join(expected), ", got ", join(actual));
}

DType Checks::floating(const char* name, const Tensor& tensor) const {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      that(false, name, " must be float32, bfloat16 or float16, got ", to_string(tensor.scalar_type()));
      return DType::kFloat32;
  }
}

void Checks::dtype(const char* name, const Tensor& tensor, ScalarType expected) const {
  if (tensor.scalar_type() == expected) return;
  that(false, name, " must be ", to_string(expected), ", got ", to_string(tensor.scalar_type()));
}

void Checks::same_dtype(const char* name, const Tensor& tensor) const {
  if (tensor.scalar_type() == first_.scalar_type()) return;
  that(false, name, " must be ", to_string(first_.scalar_type()), " like ", first_name_, ", got ",
       to_string(tensor.scalar_type()));
}

void Checks::same_device(const char* name, const Tensor& tensor) const {
  if (tensor.device() == first_.device()) return;
  that(false, name, " must be on ", device_name(first_), " like ", first_name_, ", got ", device_name(tensor));
}

bool Checks::is_like_first(const Tensor& tensor) const {
  return tensor.scalar_type() == first_.scalar_type() && tensor.device() == first_.device();
}

void Checks::index(const char* name, const Tensor& tensor, int64_t rank, const char* shape) const {
  this->rank(name, tensor, rank, shape);
  dtype(name, tensor, ScalarType::Int);
  same_device(name, tensor);
}

void Checks::float_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                         const char* shape) const {
  this->shape(name, tensor, sizes, shape);
  dtype(name, tensor, ScalarType::Float);
  same_device(name, tensor);
}

void Checks::expert_offsets(const Tensor& tensor, int64_t num_experts, int64_t num_rows) const {
  index("expert_offsets", tensor, 1, "[num_experts + 1]");
  shape("expert_offsets", tensor, {num_experts + 1}, "[num_experts + 1]");
  if (!tensor.is_cpu()) return;  // reading them would wait for the device; the kernels clamp instead
  const Tensor offsets_tensor = dense(tensor);
  const int32_t* offsets = offsets_tensor.const_data_ptr<int32_t>();
  that(offsets[0] == 0, "expert_offsets must begin with 0, got ", offsets[0]);
  for (int64_t e = 0; e < num_experts; ++e) {
    that(offsets[e] <= offsets[e + 1], "expert_offsets must not fall, got ", offsets[e], " then ", offsets[e + 1],
         " at expert ", e);
  }
  that(offsets[num_experts] <= num_rows, "expert_offsets must end at no more than the number of rows, ", num_rows,
       ", got ", offsets[num_experts]);
}

Activation Checks::activation(const std::string& name, bool gated, Swiglu& swiglu) const {
  if (!parse_swiglu(name, swiglu)) return look_up(*this, "activation", kActivations, name);
  that(gated, "activation swiglu is a gate, so gated must be true");
  that(swiglu.limit > 0.0f, "the limit of activation swiglu must be more than 0, got ", swiglu.limit);
  return Activation::kSwiglu;
}

Scoring Checks::scoring(const std::string& name) const {
  return look_up(*this, "scoring", kScorings, name);
}

Score Checks::score(const std::string& name) const {
  return look_up(*this, "score", kScores, name);
}

DType Checks::probs_dtype(const std::optional<ScalarType>& dtype, Scoring scoring) const {
  if (!dtype.has_value()) return DType::kFloat32;
  that(scoring != Scoring::kSparsemixer, "probs_dtype does not apply to scoring 'sparsemixer'");
  that(*dtype == ScalarType::Float || *dtype == ScalarType::BFloat16 || *dtype == ScalarType::Half,
       "probs_dtype must be float32, bfloat16 or float16, got ", to_string(*dtype));
  return *dtype == ScalarType::Float      ? DType::kFloat32
         : *dtype == ScalarType::BFloat16 ? DType::kBFloat16
                                          : DType::kFloat16;
}

Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1 ? tensor
                                                                                   : torch::stable::contiguous(tensor);
}

std::optional<Tensor> dense_rows(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(dense_rows(*tensor)) : std::nullopt;
}

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

}  // namespace moekernels
