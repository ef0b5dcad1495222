# The LibTorch stable ABI of the torch that is already installed: headers and libtorch_cpu, nothing else.
# Defines TorchStable::TorchStable, TorchStable_VERSION, and TorchStable_CUDA: the CUDA version that torch was built with,
# empty for a CPU build. Works with the CPU wheel, for CUDA builds too.
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
  OUTPUT_VARIABLE TorchStable_DIR
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_VARIABLE TorchStable_ERROR
  RESULT_VARIABLE TorchStable_RESULT)

if(TorchStable_RESULT EQUAL 0)
  file(STRINGS "${TorchStable_DIR}/version.py" version_line REGEX "^__version__")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+[^'\"]*" TorchStable_VERSION "${version_line}")
  file(STRINGS "${TorchStable_DIR}/version.py" cuda_line REGEX "^cuda")
  string(REGEX MATCH "[0-9]+\\.[0-9]+" TorchStable_CUDA "${cuda_line}")
  find_library(TorchStable_LIBRARY torch_cpu PATHS "${TorchStable_DIR}/lib" NO_DEFAULT_PATH NO_CACHE)
else()
  string(STRIP "${TorchStable_ERROR}" TorchStable_ERROR)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchStable
  REQUIRED_VARS TorchStable_LIBRARY TorchStable_DIR
  VERSION_VAR TorchStable_VERSION
  REASON_FAILURE_MESSAGE "${TorchStable_ERROR}")

if(TorchStable_FOUND AND NOT TARGET TorchStable::TorchStable)
  add_library(TorchStable::TorchStable INTERFACE IMPORTED)
  target_include_directories(TorchStable::TorchStable SYSTEM INTERFACE "${TorchStable_DIR}/include")
  # 2.11: the oldest torch the binary shall load under.
  target_compile_definitions(TorchStable::TorchStable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
  target_link_libraries(TorchStable::TorchStable INTERFACE "${TorchStable_LIBRARY}")
  # libtorch_cpu's own dependencies are torch's affair: it is loaded before this library, and without an rpath of ours.
  if(NOT APPLE)
    target_link_options(TorchStable::TorchStable INTERFACE -Wl,--allow-shlib-undefined)
  endif()
endif()
