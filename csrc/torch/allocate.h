// Tensors that an op returns.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

namespace moekernels {

// An uninitialised tensor with the dtype and the device of `like`. On the CPU the system is asked to back a large one
// with huge pages: memory that the C library returns to the system is new each time, and to have it cleared in pages of
// 4 KB takes longer than to fill it.
torch::stable::Tensor new_empty(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes);

}  // namespace moekernels
