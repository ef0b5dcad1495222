#include "moekernels/cuda.h"

namespace moekernels {

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace moekernels
