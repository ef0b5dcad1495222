#include "launch.h"

#include <torch/csrc/stable/ops.h>

#ifdef MOEKERNELS_CUDA
#include <dlfcn.h>
#endif

namespace moekernels {

using torch::stable::Tensor;

Parallel TorchResources::parallel() {
  const auto run = [](void*, int64_t num_tasks, Parallel::Body body, void* body_context) {
    torch::stable::parallel_for(0, num_tasks, 1, [=](int64_t begin, int64_t end) { body(body_context, begin, end); });
  };
  const auto scratch = [](void* self, int64_t num_bytes) {
    auto& resources = *static_cast<TorchResources*>(self);
    resources.scratch_ = empty_bytes(num_bytes, resources.on_);
    return resources.scratch_->data_ptr();
  };
  return {run, scratch, this, static_cast<int32_t>(torch::stable::get_num_threads())};
}

#ifdef MOEKERNELS_CUDA
// The CPU build of torch lacks the function, and torch loads its libraries with local visibility, so it is looked up in
// the library that is already there.
cudaStream_t current_stream(const Tensor& on) {
  using GetStream = int32_t (*)(int32_t device, void** stream);
  static const auto get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(on.get_device_index(), &stream) != 0) {
    throw std::runtime_error(
        "moekernels: torch's current CUDA stream could not be found; is this a CUDA build of torch?");
  }
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace moekernels
