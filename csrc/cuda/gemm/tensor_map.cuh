// Tensor maps: what TMA knows of a matrix in global memory. Made on the host, passed to a kernel by value.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "moekernels/params.h"

namespace moekernels {

// A stack of matrices [depth, rows, columns] of 16-bit elements, columns contiguous, strides in elements.
struct TensorMapSource {
  const void* data;  // 16-byte aligned
  DType dtype;       // kBFloat16 or kFloat16
  int64_t columns;
  int64_t rows;
  int64_t depth;
  int64_t row_stride;    // a multiple of 8
  int64_t depth_stride;  // a multiple of 8
};

// The driver's encoder, found without linking libcuda; nullptr where the driver is missing or too old.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
  }();
  return encoder;
}

// A map whose boxes are [1, box_rows, box_columns] (rank 3: coordinates x = column, y = row, z = depth). Outside the
// tensor, in each dimension by itself, it reads zeros. `swizzle` must span box_columns: 64 columns for the 128-byte
// swizzle.
inline cudaError_t make_tensor_map(CUtensorMap* map, const TensorMapSource& source, int32_t box_columns,
                                   int32_t box_rows, CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  const auto encoder = tensor_map_encoder();
  if (encoder == nullptr) return cudaErrorNotSupported;
  if (source.dtype == DType::kFloat32) return cudaErrorInvalidValue;
  const int64_t element = size_of(source.dtype);
  const cuuint64_t dims[3] = {static_cast<cuuint64_t>(source.columns), static_cast<cuuint64_t>(source.rows),
                              static_cast<cuuint64_t>(source.depth)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(source.row_stride * element),
                                 static_cast<cuuint64_t>(source.depth_stride * element)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  const CUresult result = encoder(
      map, source.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(source.data), dims, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace moekernels
