#include "cuda/common/architectures.h"
#include "cuda/common/launch.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

// What is wrong where the device has no code in this build; "" where it has.
std::string missing_code() {
  DeviceInfo device{};
  if (device_info(&device) != cudaSuccess) return "";
  const std::string capability = std::to_string(device.compute_capability);
  if (!code_for_device(MOEKERNELS_CUDA_ARCHS, device.compute_capability).empty()) return "";
  return "; this build has code for " MOEKERNELS_CUDA_ARCHS ", and the GPU is sm_" + capability +
         ": build with MOEKERNELS_CUDA_ARCHS=" + capability;
}

}  // namespace

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error) + missing_code();
}

}  // namespace moekernels
