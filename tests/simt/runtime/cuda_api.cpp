// The few functions of the CUDA runtime and driver that launchers call.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "global_memory.h"
#include "launch_emulated.h"
#include "tensor_map.h"

namespace simt {

std::string tensor_map_log;

namespace {

// One device per distinct set of properties, so that what launchers remember per device stays right.
std::vector<DeviceProperties> devices = {{90, 4}};
int current = 0;

unsigned element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
      return 4;
    default:
      return 0;
  }
}

unsigned swizzle_span(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return ~0u;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return 0;
  }
}

template <class Number>
void log_numbers(const Number* numbers, cuuint32_t count) {
  for (cuuint32_t i = 0; i < count; ++i) tensor_map_log += " " + std::to_string(numbers[i]);
}

// cuTensorMapEncodeTiled, with the limits its documentation gives.
CUresult encode_tiled(CUtensorMap* opaque, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const int kinds[] = {type, static_cast<int>(rank), interleave, swizzle, fill};
  log_numbers(kinds, 5);
  log_numbers(dims, rank);
  log_numbers(strides, rank - 1);
  log_numbers(box, rank);
  log_numbers(element_strides, rank);
  tensor_map_log += "\n";

  TensorMap map{};
  map.magic = TensorMap::kMagic;
  map.base = static_cast<unsigned char*>(base);
  map.rank = rank;
  map.element_bytes = element_bytes(type);
  map.swizzle = static_cast<uint32_t>(swizzle);
  bool valid = rank >= 1 && rank <= 5 && map.element_bytes != 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
               base != nullptr && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
               fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && reinterpret_cast<uintptr_t>(opaque) % 64 == 0;
  for (cuuint32_t i = 0; valid && i < rank; ++i) {
    map.dims[i] = dims[i];
    map.box[i] = box[i];
    map.strides[i] = i == 0 ? map.element_bytes : strides[i - 1];
    valid = dims[i] >= 1 && dims[i] <= (uint64_t{1} << 32) && box[i] >= 1 && box[i] <= 256 && element_strides[i] == 1;
    if (i > 0) valid = valid && strides[i - 1] % 16 == 0 && strides[i - 1] < (uint64_t{1} << 40);
  }
  const uint32_t row = valid ? box[0] * map.element_bytes : 0;
  if (!valid || row % 16 != 0 || row > swizzle_span(swizzle)) return CUDA_ERROR_INVALID_VALUE;
  memcpy(opaque, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace

const DeviceProperties& current_device() {
  return devices[static_cast<size_t>(current)];
}

void set_device(int compute_capability, int sm_count) {
  for (size_t i = 0; i < devices.size(); ++i) {
    if (devices[i].compute_capability == compute_capability && devices[i].sm_count == sm_count) {
      current = static_cast<int>(i);
      return;
    }
  }
  devices.push_back({compute_capability, sm_count});
  current = static_cast<int>(devices.size()) - 1;
}

int DeviceProperties::max_smem_bytes() const {
  switch (compute_capability) {
    case 80:
      return 166912;
    case 90:
    case 100:
      return 232448;
    default:  // consumer cards
      return 101376;
  }
}

}  // namespace simt

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = simt::current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || static_cast<size_t>(device) >= simt::devices.size()) return cudaErrorInvalidDevice;
  const simt::DeviceProperties& properties = simt::devices[static_cast<size_t>(device)];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = properties.sm_count;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.compute_capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.compute_capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = properties.max_smem_bytes();
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  simt::forget_writes();  // it waits for all before it, and all after it for it
  memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  simt::forget_writes();
  memmove(to, from, bytes);
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
  static thread_local char name[32];
  snprintf(name, sizeof name, "cudaError %d", static_cast<int>(error));
  return name;
}

const char* cudaGetErrorString(cudaError_t) {
  return "as the emulator calls it";
}

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() {
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&simt::encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
