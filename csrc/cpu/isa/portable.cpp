// Compiled for the baseline of the target: SSE2, NEON, or whatever the compiler makes of vectors of four floats.
#define MOEKERNELS_VECTOR_BYTES 16
#define MOEKERNELS_NATIVE_BFLOAT16 0
#define MOEKERNELS_FETCH_FROM_MEMORY 1
#define MOEKERNELS_TILE_REGISTERS 0

#include "cpu/isa/kernels.h"

namespace moekernels::cpu {
namespace {

constexpr KernelTable kKernels = kernel_table(gemm_kernel<DotFloat32>(), gemm_kernel<DotBFloat16>());

}  // namespace

const KernelTable* portable_kernels() {
  return &kKernels;
}

}  // namespace moekernels::cpu
