// What a caller of an op is told of an error, as text in a buffer.
#include <cstring>

#include "cuda/common/architectures.h"
#include "moekernels/cuda.h"

extern "C" cudaError_t describe_error(int64_t error, char* text, int64_t size) {
  const std::string said = moekernels::describe(static_cast<cudaError_t>(error));
  std::strncpy(text, said.c_str(), static_cast<size_t>(size));
  return cudaSuccess;
}
