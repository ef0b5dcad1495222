// Warpgroup matrix multiply (sm_90a): the four warps of a warpgroup compute d += a b asynchronously, both operands read
// from shared memory through descriptors.
//
// Order, per tile: wgmma_keep(d), wgmma_fence, any number of wgmma, wgmma_commit_group, wgmma_wait_group<n>,
// wgmma_keep(d). Between issue and wait nothing may touch d, not even a copy. wgmma reads through the async proxy: see
// ptx::fence_proxy_async.
#pragma once

#include "cuda/ptx/ptx.cuh"

#ifndef MOEKERNELS_SIMT

#include <type_traits>

namespace moekernels::ptx {

// Orders earlier writes of accumulators before the wgmma that follow: before the first one, and after touching d.
MOEKERNELS_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

MOEKERNELS_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
MOEKERNELS_DEVICE void wgmma_wait_group() {
  static_assert(kPending >= 0 && kPending <= 7);
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accumulators across the point where it stands.
template <int kCount>
MOEKERNELS_DEVICE void wgmma_keep(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The operand lists of the asm below, cumulative: names %0 .. %n-1 and the registers they stand for.
// clang-format off
#define MOEKERNELS_WGMMA_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
  "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOEKERNELS_WGMMA_NAMES_4 "%0, %1, %2, %3"
#define MOEKERNELS_WGMMA_NAMES_8 MOEKERNELS_WGMMA_NAMES_4 ", %4, %5, %6, %7"
#define MOEKERNELS_WGMMA_NAMES_16 MOEKERNELS_WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MOEKERNELS_WGMMA_NAMES_32 \
  MOEKERNELS_WGMMA_NAMES_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOEKERNELS_WGMMA_NAMES_48 \
  MOEKERNELS_WGMMA_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MOEKERNELS_WGMMA_NAMES_64 \
  MOEKERNELS_WGMMA_NAMES_48 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MOEKERNELS_WGMMA_NAMES_96 \
  MOEKERNELS_WGMMA_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MOEKERNELS_WGMMA_NAMES_128 \
  MOEKERNELS_WGMMA_NAMES_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MOEKERNELS_WGMMA_REGS_4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define MOEKERNELS_WGMMA_REGS_8(d) MOEKERNELS_WGMMA_REGS_4(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define MOEKERNELS_WGMMA_REGS_16(d) MOEKERNELS_WGMMA_REGS_8(d), MOEKERNELS_WGMMA_8(d, 8)
#define MOEKERNELS_WGMMA_REGS_32(d) MOEKERNELS_WGMMA_REGS_16(d), MOEKERNELS_WGMMA_8(d, 16), MOEKERNELS_WGMMA_8(d, 24)
#define MOEKERNELS_WGMMA_REGS_48(d) MOEKERNELS_WGMMA_REGS_32(d), MOEKERNELS_WGMMA_8(d, 32), MOEKERNELS_WGMMA_8(d, 40)
#define MOEKERNELS_WGMMA_REGS_64(d) MOEKERNELS_WGMMA_REGS_48(d), MOEKERNELS_WGMMA_8(d, 48), MOEKERNELS_WGMMA_8(d, 56)
#define MOEKERNELS_WGMMA_REGS_96(d) \
  MOEKERNELS_WGMMA_REGS_64(d), MOEKERNELS_WGMMA_8(d, 64), MOEKERNELS_WGMMA_8(d, 72), \
  MOEKERNELS_WGMMA_8(d, 80), MOEKERNELS_WGMMA_8(d, 88)
#define MOEKERNELS_WGMMA_REGS_128(d) \
  MOEKERNELS_WGMMA_REGS_96(d), MOEKERNELS_WGMMA_8(d, 96), MOEKERNELS_WGMMA_8(d, 104), \
  MOEKERNELS_WGMMA_8(d, 112), MOEKERNELS_WGMMA_8(d, 120)
// clang-format on

#define MOEKERNELS_WGMMA_ASM(type, n, regs, a, b, p, ta, tb)                                                           \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " p ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
               " {" MOEKERNELS_WGMMA_NAMES_##regs "}, " a ", " b ", p, 1, 1, " ta ", " tb ";}"                         \
               : MOEKERNELS_WGMMA_REGS_##regs(d)                                                                       \
               : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulate)), "n"(kTransA), "n"(kTransB))

#define MOEKERNELS_WGMMA_CASE(n, regs, a, b, p, ta, tb)       \
  if constexpr (kN == n) {                                    \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {         \
      MOEKERNELS_WGMMA_ASM("bf16", n, regs, a, b, p, ta, tb); \
    } else {                                                  \
      MOEKERNELS_WGMMA_ASM("f16", n, regs, a, b, p, ta, tb);  \
    }                                                         \
  }

// d [64, kN] += a [64, 16] b [16, kN] (d = a b when `accumulate` is false, whatever d held). T: __nv_bfloat16 or
// __half. kTransA/B: 0 when the operand's consecutive elements run along K, 1 when they run along M or N. d[i] of
// thread t, with w = t / 32 % 4, g = t % 32 / 4, q = t % 4:
//   row 16w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2q + i % 2.
template <class T, int kN, int kTransA = 0, int kTransB = 0>
MOEKERNELS_DEVICE void wgmma_m64k16(float (&d)[kN / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(kN == 8 || kN == 16 || kN == 32 || kN == 64 || kN == 96 || kN == 128 || kN == 192 || kN == 256);
  MOEKERNELS_WGMMA_CASE(8, 4, "%4", "%5", "%6", "%7", "%8")
  MOEKERNELS_WGMMA_CASE(16, 8, "%8", "%9", "%10", "%11", "%12")
  MOEKERNELS_WGMMA_CASE(32, 16, "%16", "%17", "%18", "%19", "%20")
  MOEKERNELS_WGMMA_CASE(64, 32, "%32", "%33", "%34", "%35", "%36")
  MOEKERNELS_WGMMA_CASE(96, 48, "%48", "%49", "%50", "%51", "%52")
  MOEKERNELS_WGMMA_CASE(128, 64, "%64", "%65", "%66", "%67", "%68")
  MOEKERNELS_WGMMA_CASE(192, 96, "%96", "%97", "%98", "%99", "%100")
  MOEKERNELS_WGMMA_CASE(256, 128, "%128", "%129", "%130", "%131", "%132")
}

}  // namespace moekernels::ptx

#endif  // MOEKERNELS_SIMT

namespace moekernels::ptx {

// Every swizzle repeats after so many bytes at most: the tiles under it start on multiples of them.
constexpr uint32_t kSwizzleAlignment = 1024;

// Dynamic shared memory from the first such multiple on; the launch has to ask for so many bytes more.
__device__ __forceinline__ unsigned char* align_for_swizzle(unsigned char* smem) {
  return smem + (0u - smem_address(smem)) % kSwizzleAlignment;
}

enum class Swizzle : uint32_t { kNone = 0, k128B = 1, k64B = 2, k32B = 3 };

// The descriptor of an operand in shared memory; `leading` and `stride` are byte offsets, multiples of 16.
// The usual operand, K-major rows of 64 elements under the 128-byte swizzle: leading is ignored, stride 1024 (8 rows),
// each k16 step adds 2 to the descriptor, each 64 rows add 512.
// M- or N-major, blocks of 64 columns by `k_rows` rows of 128 bytes: leading 128 * k_rows (the next 64 columns), stride
// 1024 (the next 8 k), each k16 step adds 128.
__host__ __device__ constexpr uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                                        Swizzle swizzle) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>((leading & 0x3FFFF) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3FFFF) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

}  // namespace moekernels::ptx
