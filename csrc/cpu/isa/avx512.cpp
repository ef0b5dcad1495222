// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c.
#define MOEKERNELS_VECTOR_BYTES 64
#define MOEKERNELS_NATIVE_BFLOAT16 0
#define MOEKERNELS_FETCH_FROM_MEMORY 1
#define MOEKERNELS_TILE_REGISTERS 0

#include "cpu/kernel_table.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "cpu/isa/kernels.h"

namespace moekernels::cpu {
namespace {

constexpr KernelTable kKernels = kernel_table(gemm_kernel<DotFloat32>(), gemm_kernel<DotBFloat16>());

}  // namespace

const KernelTable* avx512_kernels() {
  return &kKernels;
}

}  // namespace moekernels::cpu
#else
const moekernels::cpu::KernelTable* moekernels::cpu::avx512_kernels() {
  return nullptr;
}
#endif
