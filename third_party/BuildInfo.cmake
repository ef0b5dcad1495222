# Writes generated/build_info.h: what `moekernels info` reports about this build.
set(MOEKERNELS_GIT_REVISION "unknown")
find_package(Git QUIET)
if(Git_FOUND AND EXISTS "${PROJECT_SOURCE_DIR}/.git")
  execute_process(
    COMMAND "${GIT_EXECUTABLE}" describe --always --dirty --abbrev=12 --match=NO_TAGS
    WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}"
    OUTPUT_VARIABLE revision
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET)
  if(revision)
    set(MOEKERNELS_GIT_REVISION "${revision}")
  endif()
endif()
set(MOEKERNELS_CXX_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
if(MOEKERNELS_USE_CUDA)
  set(MOEKERNELS_CUDA_COMPILER "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
string(REPLACE ";" " " MOEKERNELS_CUDA_ARCHS_TEXT "${MOEKERNELS_CUDA_ARCH_LIST}")
configure_file("${CMAKE_CURRENT_LIST_DIR}/build_info.h.in" "${CMAKE_CURRENT_BINARY_DIR}/generated/build_info.h" @ONLY)
