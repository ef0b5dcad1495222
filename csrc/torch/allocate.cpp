#include "allocate.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <vector>

#include "moekernels/memory.h"

namespace moekernels {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// `dtype` is torch's number for it. Asked of torch's allocator itself: the dispatcher would cost more than a small op.
Tensor empty(IntHeaderOnlyArrayRef sizes, int32_t dtype, const Tensor& on) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  if (on.is_cpu()) {
    size_t num_bytes = aoti_torch_dtype_element_size(dtype);
    for (const int64_t size : sizes) num_bytes *= static_cast<size_t>(size);
    if (void* block = take_block(num_bytes)) {
      const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
      return torch::stable::from_blob(block, sizes, IntHeaderOnlyArrayRef(strides), cpu, to<ScalarType>(from(dtype)),
                                      [num_bytes](void* memory) { give_back_block(memory, num_bytes); });
    }
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, device_type, on.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

Tensor new_empty(const Tensor& like, IntHeaderOnlyArrayRef sizes) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(sizes, dtype, like);
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return moekernels::new_empty(like, IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), to<int32_t>(from(dtype)), like);
}

Tensor empty_bytes(int64_t num_bytes, const Tensor& on) {
  return empty(IntHeaderOnlyArrayRef(&num_bytes, 1), aoti_torch_dtype_uint8(), on);
}

}  // namespace moekernels
