// Runs an op's kernel on the device of its tensors: on the CPU with torch's threads, on a GPU on torch's current
// stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "allocate.h"
#include "moekernels/cpu.h"
#ifdef MOEKERNELS_CUDA
#include "moekernels/cuda.h"
#endif

namespace moekernels {

// Torch's threads, and scratch memory that lives as long as this.
class TorchResources {
 public:
  explicit TorchResources(const torch::stable::Tensor& on) : on_(on) {}
  TorchResources(const TorchResources&) = delete;
  TorchResources& operator=(const TorchResources&) = delete;

  Parallel parallel();

 private:
  const torch::stable::Tensor& on_;
  std::optional<torch::stable::Tensor> scratch_;
};

#ifdef MOEKERNELS_CUDA
// Torch's current stream on the tensor's device.
cudaStream_t current_stream(const torch::stable::Tensor& on);

template <typename Params>
void launch_cuda(Params& params, const torch::stable::Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  std::optional<torch::stable::Tensor> workspace;  // given back once the stream has passed the kernels below
  if constexpr (requires { workspace_bytes(params); }) {
    const int64_t num_bytes = workspace_bytes(params);
    workspace = empty_bytes(num_bytes, on);
    params.workspace = num_bytes > 0 ? workspace->data_ptr() : nullptr;
  }
  if (const cudaError_t error = run(params, current_stream(on)); error != cudaSuccess) {
    throw std::runtime_error(std::string("moekernels::") + Params::kOp + ": " + describe(error));
  }
}
#endif

// `Params` is one of the structs of params.h. `on` is any tensor of the op.
// Throws "moekernels::<op>: ..." if a CUDA launch fails.
template <typename Params>
void launch(Params params, const torch::stable::Tensor& on) {
#ifdef MOEKERNELS_CUDA
  if constexpr (requires(cudaStream_t stream) { run(params, stream); }) {
    if (on.is_cuda()) return launch_cuda(params, on);
  }
#endif
  TorchResources resources(on);
  run(params, resources.parallel());
}

}  // namespace moekernels
