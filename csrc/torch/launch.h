// Runs an op's kernel on the device of its tensors: on the CPU with torch's threads, on a GPU on torch's current
// stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "moekernels/params.h"

namespace moekernels {

// `Params` is one of the structs of params.h. `on` is any tensor of the op. The workspace, where a kernel needs one, is
// allocated here. Throws "moekernels::<op>: ..." if a CUDA launch fails.
template <typename Params>
void launch(Params params, const torch::stable::Tensor& on);

}  // namespace moekernels
