// Compiled with -mavx2 -mfma -mf16c.
#define MOEKERNELS_VECTOR_BYTES 32
#define MOEKERNELS_NATIVE_BFLOAT16 0
#define MOEKERNELS_FETCH_FROM_MEMORY 1
#define MOEKERNELS_TILE_REGISTERS 0

#include "cpu/kernel_table.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "cpu/isa/kernels.h"

namespace moekernels::cpu {
namespace {

constexpr KernelTable kKernels = kernel_table(gemm_kernel<DotFloat32>(), gemm_kernel<DotBFloat16>());

}  // namespace

const KernelTable* avx2_kernels() {
  return &kKernels;
}

}  // namespace moekernels::cpu
#else
const moekernels::cpu::KernelTable* moekernels::cpu::avx2_kernels() {
  return nullptr;
}
#endif
