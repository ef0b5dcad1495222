// Compiled with -mavx512bf16 -mavx512vnni on top of the flags of avx512.cpp.
#define MOEKERNELS_VECTOR_BYTES 64
#define MOEKERNELS_NATIVE_BFLOAT16 1
#define MOEKERNELS_FETCH_FROM_MEMORY 1
#define MOEKERNELS_TILE_REGISTERS 0

#include "cpu/kernel_table.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "cpu/isa/kernels.h"

namespace moekernels::cpu {
namespace {

constexpr KernelTable kKernels = kernel_table(gemm_kernel<DotFloat32>(), gemm_kernel<DotBFloat16Native>());

}  // namespace

const KernelTable* avx512bf16_kernels() {
  return &kKernels;
}

}  // namespace moekernels::cpu
#else
const moekernels::cpu::KernelTable* moekernels::cpu::avx512bf16_kernels() {
  return nullptr;
}
#endif
