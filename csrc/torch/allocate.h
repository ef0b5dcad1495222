// Tensors that an op returns or works in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <initializer_list>

namespace moekernels {

// An uninitialised tensor on the device of `like`, and in its dtype unless there is another one. A large one on the CPU
// lies in a block of moekernels/memory.h and cannot be resized.
torch::stable::Tensor new_empty(const torch::stable::Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes);
torch::stable::Tensor new_empty(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes);
torch::stable::Tensor new_empty(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes,
                                torch::headeronly::ScalarType dtype);

// Scratch memory on the device of `on`, likewise.
torch::stable::Tensor empty_bytes(int64_t num_bytes, const torch::stable::Tensor& on);

}  // namespace moekernels
