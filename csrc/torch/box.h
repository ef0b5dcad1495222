// MOEKERNELS_BOX is TORCH_BOX for functions that may take strings. To make a std::string of what the dispatcher passes,
// torch 2.13 allocates a copy that nobody deletes, in every call.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string>
#include <type_traits>

namespace moekernels {

// The dispatcher's string, taken over.
inline std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

template <typename T>
inline constexpr bool kIsString = std::is_same_v<T, const std::string&>;

template <typename T>
using Boxed = std::conditional_t<kIsString<T>, StringHandle, T>;

template <typename T>
decltype(auto) unboxed(Boxed<T>& value) {
  if constexpr (kIsString<T>) {
    return take_string(value);
  } else {
    return static_cast<T>(value);
  }
}

template <auto kFunction>
struct WithHandles;

template <typename Result, typename... Parameters, Result (*kFunction)(Parameters...)>
struct WithHandles<kFunction> {
  static Result call(Boxed<Parameters>... values) { return kFunction(unboxed<Parameters>(values)...); }
};

}  // namespace moekernels

#define MOEKERNELS_BOX(function) TORCH_BOX(&moekernels::WithHandles<&moekernels::function>::call)
