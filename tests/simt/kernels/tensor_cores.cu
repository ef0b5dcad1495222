// ldmatrix, mma.sync and wgmma on single tiles, with every operand layout the library uses.
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace moekernels;

// ---- mma.sync: one warp, out [16, 8] float32 = a [16, 16] b, with b [8, 16] or, transposed, [16, 8] ----

template <class T, bool kTransposed>
__global__ void mma_kernel(const T* a, const T* b, float* out) {
  MOEKERNELS_DYNAMIC_SMEM(raw);
  T* a_tile = reinterpret_cast<T*>(raw);
  T* b_tile = a_tile + 16 * 16;
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256; i += 32) a_tile[i] = a[i];
  for (unsigned i = lane; i < 128; i += 32) b_tile[i] = b[i];
  __syncwarp();
  uint32_t a_fragment[4];
  uint32_t b_fragment[4];
  ptx::ldmatrix_x4(a_fragment, ptx::smem_address(a_tile + (lane & 15) * 16 + (lane >> 4) * 8));
  // Only two of the four matrices exist; the other lanes repeat their addresses.
  if (kTransposed) {
    ptx::ldmatrix_x4_trans(b_fragment, ptx::smem_address(b_tile + (lane & 15) * 8));
  } else {
    ptx::ldmatrix_x4(b_fragment, ptx::smem_address(b_tile + (lane & 7) * 16 + (lane >> 3 & 1) * 8));
  }
  float d[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k16<T>(d, a_fragment, b_fragment[0], b_fragment[1]);
  for (unsigned i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// out [16, 8] = a [16, 8] b, with b [8, 8] as [column, k]
__global__ void tf32_kernel(const float* a, const float* b, float* out) {
  const unsigned g = threadIdx.x / 4;
  const unsigned q = threadIdx.x % 4;
  uint32_t a_fragment[4];
  for (unsigned i = 0; i < 4; ++i) a_fragment[i] = ptx::cvt_rna_tf32(a[(g + i % 2 * 8) * 8 + q + i / 2 * 4]);
  float d[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k8_tf32(d, a_fragment, ptx::cvt_rna_tf32(b[g * 8 + q]), ptx::cvt_rna_tf32(b[g * 8 + q + 4]));
  for (unsigned i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + q * 2 + i % 2] = d[i];
}

// in [16, 16] -> out [16, 16]: ldmatrix, then stmatrix to a second tile
__global__ void stmatrix_kernel(const __half* in, __half* out) {
#if MOEKERNELS_SM90A
  __shared__ __align__(16) __half tiles[2][256];
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256; i += 32) tiles[0][i] = in[i];
  __syncwarp();
  const unsigned row = (lane & 15) * 16 + (lane >> 4) * 8;
  uint32_t registers[4];
  ptx::ldmatrix_x4(registers, ptx::smem_address(&tiles[0][row]));
  ptx::stmatrix_x4(ptx::smem_address(&tiles[1][row]), registers);
  __syncwarp();
  for (unsigned i = lane; i < 256; i += 32) out[i] = tiles[1][i];
#endif
}

// ---- wgmma: one warpgroup, out [64, kN] = a b^T + 1 over two k16 steps, a [64, 32], b [kN, 32] ----

// How an operand of `rows` rows and 32 columns lies in shared memory.
struct Layout {
  ptx::Swizzle swizzle;
  bool transposed;  // consecutive elements run along the rows

  // The swizzles as formulas of row and 16-byte chunk, for comparison with what the descriptor says.
  __device__ unsigned offset(unsigned rows, unsigned row, unsigned k) const {
    const unsigned line = transposed ? k : row;
    const unsigned along = transposed ? row : k;
    switch (swizzle) {
      case ptx::Swizzle::k128B: {
        // Lines of 64 elements; K-major operands use the first half of theirs.
        const unsigned block = transposed ? along / 64 * 32 * 128 : 0;
        const unsigned chunk = along % 64 / 8;
        return block + line * 128 + ((chunk ^ (line & 7)) << 4) + along % 8 * 2;
      }
      case ptx::Swizzle::k64B: {
        const unsigned block = transposed ? along / 32 * 32 * 64 : 0;
        const unsigned chunk = along % 32 / 8;
        return block + line * 64 + ((chunk ^ (line >> 1 & 3)) << 4) + along % 8 * 2;
      }
      case ptx::Swizzle::k32B: {
        const unsigned slab = along / 16 * rows * 32;  // 16 k per slab
        const unsigned chunk = along % 16 / 8;
        return slab + line * 32 + ((chunk ^ (line >> 2 & 1)) << 4) + along % 8 * 2;
      }
      case ptx::Swizzle::kNone:
        break;
    }
    return along / 8 * rows * 16 + line * 16 + along % 8 * 2;  // columns of 16 bytes
  }

  __device__ uint64_t descriptor(uint32_t address, unsigned rows) const {
    const bool wide = swizzle == ptx::Swizzle::k128B;
    const uint32_t line_bytes = wide ? 128 : 64;
    if (transposed) return ptx::wgmma_descriptor(address, 32 * line_bytes, 8 * line_bytes, swizzle);
    if (swizzle == ptx::Swizzle::kNone) return ptx::wgmma_descriptor(address, rows * 16, 128, swizzle);
    if (swizzle == ptx::Swizzle::k32B) return ptx::wgmma_descriptor(address, 16, 256, swizzle);
    return ptx::wgmma_descriptor(address, 16, 8 * line_bytes, swizzle);
  }

  // What the next 16 k add to the descriptor.
  __device__ uint64_t step(unsigned rows) const {
    const bool wide = swizzle == ptx::Swizzle::k128B;
    if (transposed) return 16 * (wide ? 128 : 64) / 16;
    if (swizzle == ptx::Swizzle::kNone) return 2 * rows;
    if (swizzle == ptx::Swizzle::k32B) return 2 * rows;
    return 2;
  }
};

template <class T, int kN, bool kTransA, bool kTransB>
__global__ void wgmma_kernel(const T* a, const T* b, float* out, Layout a_layout, Layout b_layout) {
#if MOEKERNELS_SM90A
  MOEKERNELS_DYNAMIC_SMEM(given);
  unsigned char* const raw = ptx::align_for_swizzle(given);
  unsigned char* a_tile = raw;
  unsigned char* b_tile = raw + 16384;
  for (unsigned i = threadIdx.x; i < 64 * 32; i += 128) {
    *reinterpret_cast<T*>(a_tile + a_layout.offset(64, i / 32, i % 32)) = a[i];
  }
  for (unsigned i = threadIdx.x; i < kN * 32; i += 128) {
    *reinterpret_cast<T*>(b_tile + b_layout.offset(kN, i / 32, i % 32)) = b[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kN / 2];
  for (float& x : d) x = 1.f;
  const uint64_t desc_a = a_layout.descriptor(ptx::smem_address(a_tile), 64);
  const uint64_t desc_b = b_layout.descriptor(ptx::smem_address(b_tile), kN);
  ptx::wgmma_keep(d);
  ptx::wgmma_fence();
  ptx::wgmma_m64k16<T, kN, kTransA, kTransB>(d, desc_a, desc_b, true);
  ptx::wgmma_m64k16<T, kN, kTransA, kTransB>(d, desc_a + a_layout.step(64), desc_b + b_layout.step(kN), true);
  ptx::wgmma_commit_group();
  ptx::wgmma_keep(d);
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_keep(d);
  const unsigned t = threadIdx.x;
  for (unsigned i = 0; i < kN / 2; ++i) {
    const unsigned row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
    out[row * kN + i / 4 * 8 + t % 4 * 2 + i % 2] = d[i];
  }
#endif
}

template <int kN>
cudaError_t launch_wgmma(DType dtype, const void* a, const void* b, float* out, Layout a_layout, Layout b_layout) {
  return dispatch_half_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return dispatch_bool(a_layout.transposed, [&](auto trans_a) {
      return dispatch_bool(b_layout.transposed, [&](auto trans_b) {
        return launch<wgmma_kernel<T, kN, decltype(trans_a)::value, decltype(trans_b)::value>>(
            {dim3(1), dim3(128), 16384 + 256 * 128 + ptx::kSwizzleAlignment}, static_cast<const T*>(a),
            static_cast<const T*>(b), out, a_layout, b_layout);
      });
    });
  });
}

}  // namespace

extern "C" {

cudaError_t mma(const void* a, const void* b, float* out, int64_t dtype, int64_t transposed) {
  return dispatch_half_dtype(static_cast<DType>(dtype), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return dispatch_bool(transposed != 0, [&](auto trans) {
      return launch<mma_kernel<T, decltype(trans)::value>>({dim3(1), dim3(32), 1024}, static_cast<const T*>(a),
                                                           static_cast<const T*>(b), out);
    });
  });
}

cudaError_t tf32(const float* a, const float* b, float* out) {
  return launch<tf32_kernel>({dim3(1), dim3(32)}, a, b, out);
}

cudaError_t stmatrix(const __half* in, __half* out) {
  return launch<stmatrix_kernel>({dim3(1), dim3(32)}, in, out);
}

cudaError_t wgmma(const void* a, const void* b, float* out, int64_t dtype, int64_t columns, int64_t a_swizzle,
                  int64_t a_transposed, int64_t b_swizzle, int64_t b_transposed) {
  const Layout a_layout{static_cast<ptx::Swizzle>(a_swizzle), a_transposed != 0};
  const Layout b_layout{static_cast<ptx::Swizzle>(b_swizzle), b_transposed != 0};
  const auto type = static_cast<DType>(dtype);
  switch (columns) {
    case 8:
      return launch_wgmma<8>(type, a, b, out, a_layout, b_layout);
    case 64:
      return launch_wgmma<64>(type, a, b, out, a_layout, b_layout);
    case 192:
      return launch_wgmma<192>(type, a, b, out, a_layout, b_layout);
    case 256:
      return launch_wgmma<256>(type, a, b, out, a_layout, b_layout);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // extern "C"
