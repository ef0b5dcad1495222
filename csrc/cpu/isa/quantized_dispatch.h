// From how a weight is stored, and the dtype of the rows, to the types that kernels are made of.
#pragma once

#include "cpu/isa/quantized_codes.h"
#include "cpu/isa/quantized_pairs.h"

namespace moekernels::cpu {
namespace {

// function.template operator()<Codes>() of how the codes are stored.
template <class Function>
void with_float_codes(const QuantizedWeightParams& weight, const Function& function) {
  if (weight.order == CodeOrder::kBytes) {
    if (weight.group >= kMostVectors * kLanes) return function.template operator()<SignedBytes<kMostVectors>>();
    return function.template operator()<SignedBytes<32 / kLanes>>();
  }
  if (weight.order == CodeOrder::kHalves) {
    if (weight.table == nullptr) return function.template operator()<SmallIntegers<CodeOrder::kHalves>>();
    return function.template operator()<AnyValues<CodeOrder::kHalves>>();
  }
  if (weight.table == nullptr) return function.template operator()<SmallIntegers<CodeOrder::kPairs>>();
  function.template operator()<AnyValues<CodeOrder::kPairs>>();
}

#if MOEKERNELS_NATIVE_BFLOAT16
template <class Function>
void with_pairs(const QuantizedWeightParams& weight, const Function& function) {
  if (weight.order == CodeOrder::kBytes) {
    if (weight.group >= kMostVectors * kLanes) return function.template operator()<BytePairs<4>>();
    return function.template operator()<BytePairs<1>>();
  }
  if (weight.order == CodeOrder::kHalves) return function.template operator()<NibblePairs<CodeOrder::kHalves>>();
  function.template operator()<NibblePairs<CodeOrder::kPairs>>();
}
#endif

template <class T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

// The same of how they are multiplied with rows of T.
template <class T, class Function>
void with_codes(const QuantizedWeightParams& weight, const Function& function) {
#if MOEKERNELS_NATIVE_BFLOAT16
  if constexpr (kIsBFloat16<T>) return with_pairs(weight, function);
#endif
  with_float_codes(weight, function);
}

// function.template operator()<T>() of the dtype of the rows.
template <class Function>
void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function.template operator()<float>();
    case DType::kBFloat16:
      return function.template operator()<BFloat16>();
    case DType::kFloat16:
      return function.template operator()<Float16>();
  }
}

}  // namespace
}  // namespace moekernels::cpu
