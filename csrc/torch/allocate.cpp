#include "allocate.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "moekernels/memory.h"

namespace moekernels {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// None if the tensor is better left to torch.
std::optional<Tensor> in_block(IntHeaderOnlyArrayRef sizes, ScalarType dtype, size_t element_size) {
  size_t num_bytes = element_size;
  for (const int64_t size : sizes) num_bytes *= static_cast<size_t>(size);
  void* block = take_block(num_bytes);
  if (block == nullptr) return std::nullopt;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(block, sizes, IntHeaderOnlyArrayRef(strides), cpu, dtype,
                                  [num_bytes](void* memory) { give_back_block(memory, num_bytes); });
}

}  // namespace

Tensor new_empty(const Tensor& like, IntHeaderOnlyArrayRef sizes) {
  if (like.is_cpu()) {
    if (std::optional<Tensor> tensor = in_block(sizes, like.scalar_type(), like.element_size())) return *tensor;
  }
  return torch::stable::new_empty(like, sizes);
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return moekernels::new_empty(like, IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

Tensor empty_bytes(int64_t num_bytes, const Tensor& on) {
  if (on.is_cpu()) {
    if (std::optional<Tensor> tensor = in_block({num_bytes}, ScalarType::Byte, 1)) return *tensor;
  }
  return torch::stable::empty({num_bytes}, ScalarType::Byte, std::nullopt, on.device());
}

}  // namespace moekernels
