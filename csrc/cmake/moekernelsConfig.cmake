# find_package(moekernels): the kernels of an installed moekernels, for C++.
#
#   cmake -B build -DCMAKE_PREFIX_PATH="$(moekernels info --cmake-dir)"
#
# Targets:
#   moekernels::moekernels   the kernels on raw pointers (moekernels/cpu.h, moekernels/cuda.h); no torch, no Python
#   moekernels::torch        the ops in a LibTorch program (moekernels/torch_ops.h); find_package(Torch) comes first
# Variables:
#   moekernels_CUDA_ARCHS    what the CUDA kernels were built for; empty without them
get_filename_component(_moekernels_root "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
include("${CMAKE_CURRENT_LIST_DIR}/moekernelsBuild.cmake")

if(NOT TARGET moekernels::moekernels)
  add_library(moekernels::moekernels SHARED IMPORTED)
  set_target_properties(moekernels::moekernels PROPERTIES
    IMPORTED_LOCATION "${_moekernels_root}/libmoekernels.so"
    IMPORTED_NO_SONAME ON
    INTERFACE_INCLUDE_DIRECTORIES "${_moekernels_root}/include"
    INTERFACE_COMPILE_FEATURES cxx_std_17)
endif()

if(NOT TARGET moekernels::torch AND TARGET torch)
  add_library(moekernels::torch SHARED IMPORTED)
  set_target_properties(moekernels::torch PROPERTIES
    IMPORTED_LOCATION "${_moekernels_root}/libmoekernels_torch.so"
    IMPORTED_NO_SONAME ON
    # The program names no symbol of the library: it registers the ops when it is loaded.
    INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed"
    INTERFACE_LINK_LIBRARIES "moekernels::moekernels;torch")
endif()

set(moekernels_FOUND TRUE)
unset(_moekernels_root)
