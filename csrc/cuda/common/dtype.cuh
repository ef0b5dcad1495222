// Element types: conversion to and from float, 16-byte vectors, and the switch from run-time values to template
// arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "moekernels/params.h"

namespace moekernels {

// ---- conversion; rounding is to nearest, ties to even ----

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    static_assert(std::is_same_v<T, __half>);
    return __float2half_rn(x);
  }
}

// Two neighbours in one 32-bit register, `low` at the lower address. T: __nv_bfloat16 or __half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    static_assert(std::is_same_v<T, __half>);
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
  } else {
    static_assert(std::is_same_v<T, __half>);
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
}

// ---- 16 bytes at a time ----

template <class T>
struct alignas(16) Vec16 {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Whether rows of `stride` elements starting at `pointer` can all be read by Vec16<T>.
template <class T>
__host__ __device__ inline bool is_vec16_aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % Vec16<T>::kSize == 0;
}

template <class T>
__device__ __forceinline__ Vec16<T> load_vec16(const T* pointer) {
  Vec16<T> v;
  *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(pointer);
  return v;
}

template <class T>
__device__ __forceinline__ void store_vec16(T* pointer, const Vec16<T>& v) {
  *reinterpret_cast<uint4*>(pointer) = *reinterpret_cast<const uint4*>(&v);
}

// ---- dispatch: `body` is a generic lambda that returns cudaError_t ----

template <class T>
struct TypeTag {
  using Type = T;
};

// dispatch_dtype(params.dtype, [&](auto tag) { using T = typename decltype(tag)::Type; ... });
template <class Body>
cudaError_t dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
  }
  return cudaErrorInvalidValue;
}

// The 16-bit types only, for tensor-core kernels.
template <class Body>
cudaError_t dispatch_half_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
    case DType::kFloat32:
      break;
  }
  return cudaErrorInvalidValue;
}

// dispatch_bool(params.gated, [&](auto gated) { constexpr bool kGated = decltype(gated)::value; ... });
template <class Body>
cudaError_t dispatch_bool(bool value, Body&& body) {
  return value ? body(std::true_type{}) : body(std::false_type{});
}

}  // namespace moekernels
