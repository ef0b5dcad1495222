// Instructions with their operands placed by tables, which another source wrote (tests/simt/crosscheck).
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/gemm/tensor_map.cuh"
#include "cuda/gemm/warp_specialized.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace moekernels;

// ---- wgmma: sums [64, kN] of a [64, 64] and b [kN, 64] ----

// Where the elements of an operand lie (bytes), and the descriptors of its k16 steps; both from the address 0 on.
struct Operand {
  const __nv_bfloat16* elements;
  const int64_t* places;
  const int64_t* descriptors;
};

template <int kN, bool kTransA, bool kTransB>
__global__ void wgmma_kernel(Operand a, Operand b, const int64_t* sum_places, float* out) {
#if MOEKERNELS_SM90A
  MOEKERNELS_DYNAMIC_SMEM(given);
  unsigned char* const raw = ptx::align_for_swizzle(given);
  unsigned char* const a_tile = raw;
  unsigned char* const b_tile = raw + 64 * 128;
  const auto place = [](unsigned char* tile, const Operand& from, int count) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += 128) {
      *reinterpret_cast<__nv_bfloat16*>(tile + from.places[i]) = from.elements[i];
    }
  };
  place(a_tile, a, 64 * 64);
  place(b_tile, b, kN * 64);
  ptx::fence_proxy_async();
  __syncthreads();
  const auto descriptor = [](unsigned char* tile, const Operand& from, int k) {
    return static_cast<uint64_t>(from.descriptors[k]) + (ptx::smem_address(tile) >> 4);
  };
  float d[kN / 2];
  for (float& x : d) x = 0.0f;
  ptx::wgmma_keep(d);
  ptx::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    ptx::wgmma_m64k16<__nv_bfloat16, kN, kTransA, kTransB>(d, descriptor(a_tile, a, k), descriptor(b_tile, b, k), true);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_keep(d);
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_keep(d);
  for (int i = 0; i < kN / 2; ++i) out[sum_places[threadIdx.x * (kN / 2) + i]] = d[i];
#endif
}

template <int kN>
cudaError_t launch_wgmma(bool trans_a, bool trans_b, const Operand& a, const Operand& b, const int64_t* sum_places,
                         float* out) {
  return dispatch_bool(trans_a, [&](auto is_trans_a) {
    return dispatch_bool(trans_b, [&](auto is_trans_b) {
      constexpr bool kTransA = decltype(is_trans_a)::value;
      constexpr bool kTransB = decltype(is_trans_b)::value;
      const LaunchConfig config{dim3(1), dim3(128), (64 + kN) * 128 + ptx::kSwizzleAlignment};
      return launch<wgmma_kernel<kN, kTransA, kTransB>>(config, a, b, sum_places, out);
    });
  });
}

// ---- mma.sync: lane l holds a[a_places[l]], b[b_places[l]] and d[d_places[l]] ----

template <class T>
__global__ void mma_kernel(const T* a, const T* b, const int64_t* a_places, const int64_t* b_places,
                           const int64_t* d_places, float* out) {
  constexpr int kPerRegister = 4 / sizeof(T);
  const unsigned lane = threadIdx.x;
  const auto gather = [lane](uint32_t* registers, int count, const T* from, const int64_t* places) {
    for (int i = 0; i < count; ++i) {
      T values[kPerRegister];
      for (int h = 0; h < kPerRegister; ++h) values[h] = from[places[(lane * count + i) * kPerRegister + h]];
      registers[i] = *reinterpret_cast<const uint32_t*>(values);
    }
  };
  uint32_t a_fragment[4];
  uint32_t b_fragment[2];
  gather(a_fragment, 4, a, a_places);
  gather(b_fragment, 2, b, b_places);
  float d[4] = {0, 0, 0, 0};
  if constexpr (sizeof(T) == 4) {
    ptx::mma_m16n8k8_tf32(d, a_fragment, b_fragment[0], b_fragment[1]);
  } else {
    ptx::mma_m16n8k16<T>(d, a_fragment, b_fragment[0], b_fragment[1]);
  }
  for (int i = 0; i < 4; ++i) out[d_places[lane * 4 + i]] = d[i];
}

// ---- ldmatrix and stmatrix: memory [32, 8] of 16 bits to registers [32, 8], lane by lane, and back ----

__global__ void ldmatrix_kernel(const uint4* rows, uint4* registers, bool transposed) {
  __shared__ uint4 tile[32];
  tile[threadIdx.x] = rows[threadIdx.x];
  __syncwarp();
  uint32_t r[4];
  if (transposed) {
    ptx::ldmatrix_x4_trans(r, ptx::smem_address(&tile[threadIdx.x]));
  } else {
    ptx::ldmatrix_x4(r, ptx::smem_address(&tile[threadIdx.x]));
  }
  registers[threadIdx.x] = uint4{r[0], r[1], r[2], r[3]};
}

__global__ void stmatrix_kernel(const uint4* registers, uint4* rows) {
#if MOEKERNELS_SM90A
  __shared__ uint4 tile[32];
  const uint4 held = registers[threadIdx.x];
  ptx::stmatrix_x4(ptx::smem_address(&tile[threadIdx.x]), {held.x, held.y, held.z, held.w});
  __syncwarp();
  rows[threadIdx.x] = tile[threadIdx.x];
#endif
}

__global__ void swizzle_kernel(int64_t* places) {
  for (uint32_t chunk = 0; chunk < 8; ++chunk) places[threadIdx.x * 8 + chunk] = swizzle_128(threadIdx.x, chunk);
}

}  // namespace

extern "C" {

cudaError_t wgmma_by_tables(int64_t columns, int64_t trans_a, int64_t trans_b, const void* a, const int64_t* a_places,
                            const int64_t* a_descriptors, const void* b, const int64_t* b_places,
                            const int64_t* b_descriptors, const int64_t* sum_places, float* out) {
  const Operand first{static_cast<const __nv_bfloat16*>(a), a_places, a_descriptors};
  const Operand second{static_cast<const __nv_bfloat16*>(b), b_places, b_descriptors};
  const auto run = [&](auto n) {
    return launch_wgmma<decltype(n)::value>(trans_a != 0, trans_b != 0, first, second, sum_places, out);
  };
  switch (columns) {
    case 8:
      return run(std::integral_constant<int, 8>{});
    case 64:
      return run(std::integral_constant<int, 64>{});
    case 128:
      return run(std::integral_constant<int, 128>{});
    case 192:
      return run(std::integral_constant<int, 192>{});
    case 256:
      return run(std::integral_constant<int, 256>{});
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t mma_by_tables(int64_t dtype, const void* a, const void* b, const int64_t* a_places, const int64_t* b_places,
                          const int64_t* d_places, float* out) {
  return dispatch_dtype(static_cast<DType>(dtype), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return launch<mma_kernel<T>>({dim3(1), dim3(32)}, static_cast<const T*>(a), static_cast<const T*>(b), a_places,
                                 b_places, d_places, out);
  });
}

cudaError_t ldmatrix(const uint4* rows, uint4* registers, int64_t transposed) {
  return launch<ldmatrix_kernel>({dim3(1), dim3(32)}, rows, registers, transposed != 0);
}

cudaError_t stmatrix(const uint4* registers, uint4* rows) {
  return launch<stmatrix_kernel>({dim3(1), dim3(32)}, registers, rows);
}

// places [num_rows, 8]
cudaError_t swizzle_places(int64_t num_rows, int64_t* places) {
  return launch<swizzle_kernel>({dim3(1), dim3(static_cast<unsigned>(num_rows))}, places);
}

// The descriptor of a 128-byte swizzled operand at the address 0, to descriptor[0].
cudaError_t descriptor(int64_t leading, int64_t stride, uint64_t* descriptor) {
  *descriptor =
      ptx::wgmma_descriptor(0, static_cast<uint32_t>(leading), static_cast<uint32_t>(stride), ptx::Swizzle::k128B);
  return cudaSuccess;
}

cudaError_t encode(const void* data, int64_t columns, int64_t rows, int64_t depth, int64_t row_stride,
                   int64_t depth_stride, int64_t box_columns, int64_t box_rows) {
  CUtensorMap map;
  const TensorMapSource source{data, DType::kBFloat16, columns, rows, depth, row_stride, depth_stride};
  return make_tensor_map(&map, source, static_cast<int32_t>(box_columns), static_cast<int32_t>(box_rows));
}

}  // extern "C"
