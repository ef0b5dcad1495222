// Grouped GEMM of bf16 or fp16 rows with a quantised weight, or with its transpose, by mma.sync: for many rows.
//
// The frame and the multiplication are those of a plain weight, and so are the sums to the bit: they are of the weights
// that `dequantize` makes. Shared memory: [stages of rows][two tiles of weights: one is multiplied, the next one
// widened][slots of codes, as many as stages][tile starts].
#pragma once

#include "cuda/gemm/coded_tile_loader.cuh"
#include "cuda/gemm/grouped_gemm_tiled.cuh"
#include "cuda/gemm/mma_compute.cuh"

namespace moekernels {

template <class Compute_, int kStages_, class Codes>
struct QuantizedGemmTraits : TiledGemmTraits<Compute_, kStages_, /*kAligned_=*/true> {
  using Base = TiledGemmTraits<Compute_, kStages_, true>;
  using Loader = CodedTileLoader<typename Base::T, Codes, Compute_::kWeightsMajor, Base::kThreads>;
  static constexpr bool kCoded = true;
  static constexpr bool kTables = false;

  static constexpr int kWeightsBytes = kTiledN * kTileRowBytes;
  static constexpr int kWeights = kStages_ * Base::kRowsBytes;
  static constexpr int kSlots = kWeights + 2 * kWeightsBytes;
  static constexpr int kSmemBytes = kSlots + kStages_ * Loader::kSlotBytes;
  static_assert(kSlabRows * kSlabPitch * static_cast<int>(sizeof(float)) <= kSmemBytes);

  static __device__ __forceinline__ uint32_t rows_tile(uint32_t smem, int step) {
    return smem + step % kStages_ * Base::kRowsBytes;
  }
  static __device__ __forceinline__ uint32_t weights_tile(uint32_t smem, int step) {
    return smem + kWeights + step % 2 * kWeightsBytes;
  }
  static __device__ __forceinline__ uint32_t slot(uint32_t smem, int step) {
    return smem + kSlots + step % kStages_ * Loader::kSlotBytes;
  }
};

// What brings a tile's weights: with each step the codes of the next.
template <class Traits>
class CodedWeights {
 public:
  __device__ __forceinline__ CodedWeights(const QuantizedGemmParams& p, const Tile& tile)
      : num_steps_(ceil_div(static_cast<int>(p.gemm.in_features), Traits::kTileK)),
        loader_(p, tile.expert, Traits::kTransposed ? tile.col_tile * kTiledN : 0,
                [&](int r) { return feature_of(p.gemm, tile, r); }) {}

  __device__ __forceinline__ void operator()(int step, uint32_t smem) const {
    if (step == 0) loader_.load(0, Traits::slot(smem, 0));
    if (step + 1 < num_steps_) loader_.load(step + 1, Traits::slot(smem, step + 1));
  }

  __device__ __forceinline__ void widen(int step, uint32_t smem) {
    loader_.widen(step, Traits::slot(smem, step), Traits::weights_tile(smem, step));
  }

 private:
  int num_steps_;
  typename Traits::Loader loader_;
};

template <class Traits>
__device__ __forceinline__ auto weight_loader(const QuantizedGemmParams& p, const Tile& tile) {
  return CodedWeights<Traits>(p, tile);
}

// Stands in for rows that are not there.
template <class T, bool kTables>
__device__ __forceinline__ const T* readable_weight(const QuantizedGemmParams& p, int32_t) {
  return static_cast<const T*>(p.weight.codes);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::Compute::kBlocksPerSm)
    quantized_gemm_sm80_kernel(QuantizedGemmParams params, int group_m) {
  MOEKERNELS_DYNAMIC_SMEM(smem);
  run_tiled_gemm<Traits>(params, group_m, smem);
}

// Whether there is a kernel for this weight beside these rows. Scales of an expert are counted in 32 bits.
template <class Codes>
bool is_tiled(const QuantizedGemmParams& p) {
  const int64_t columns = p.gemm.transposed ? p.gemm.out_features : p.gemm.in_features;
  const int64_t rows = p.gemm.transposed ? p.gemm.in_features : p.gemm.out_features;
  return is_known<Codes>(p.weight) && !p.int8_rows && columns % Codes::kColumns == 0 &&
         rows * (columns / p.weight.group) <= INT32_MAX &&
         is_vec16_aligned<uint8_t>(p.weight.codes, p.weight.codes_stride) && has_aligned_rows(p.gemm) &&
         p.gemm.num_experts <= kMaxExpertsPerLaunch;
}

// One dtype, order of codes and height of a tile; cudaErrorInvalidValue for what is not built.
template <class T, class Codes, int kTileM, bool kTransposed>
cudaError_t launch_quantized_gemm_sm80_tile(const QuantizedGemmParams& params, const TileConfig& config,
                                            cudaStream_t stream) {
  using Compute = MmaCompute<T, kTileM, Major::kK, kTransposed ? Major::kMN : Major::kK>;
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    return launch_tiled_gemm<Traits, quantized_gemm_sm80_kernel<Traits>>(params, config, stream);
  };
  if (!is_tiled<Codes>(params)) return cudaErrorInvalidValue;
  if (config.stages == 4) return run(QuantizedGemmTraits<Compute, 4, Codes>{});
  if constexpr (kTileM == 128) {
    if (config.stages == 3) return run(QuantizedGemmTraits<Compute, 3, Codes>{});
  }
  return cudaErrorInvalidValue;
}

#define MOEKERNELS_INSTANCE(T, Codes, tile_m, transposed)                                                        \
  template cudaError_t launch_quantized_gemm_sm80_tile<T, Codes, tile_m, transposed>(const QuantizedGemmParams&, \
                                                                                     const TileConfig&, cudaStream_t)
extern MOEKERNELS_INSTANCE(__nv_bfloat16, HalvesCodes, 64, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, HalvesCodes, 128, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, HalvesCodes, 64, true);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, HalvesCodes, 128, true);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, PairCodes, 64, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, PairCodes, 128, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, PairCodes, 64, true);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, PairCodes, 128, true);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, ByteCodes, 64, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, ByteCodes, 128, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, ByteCodes, 64, true);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, ByteCodes, 128, true);
extern MOEKERNELS_INSTANCE(__half, HalvesCodes, 64, false);
extern MOEKERNELS_INSTANCE(__half, HalvesCodes, 128, false);
extern MOEKERNELS_INSTANCE(__half, HalvesCodes, 64, true);
extern MOEKERNELS_INSTANCE(__half, HalvesCodes, 128, true);
extern MOEKERNELS_INSTANCE(__half, PairCodes, 64, false);
extern MOEKERNELS_INSTANCE(__half, PairCodes, 128, false);
extern MOEKERNELS_INSTANCE(__half, PairCodes, 64, true);
extern MOEKERNELS_INSTANCE(__half, PairCodes, 128, true);
extern MOEKERNELS_INSTANCE(__half, ByteCodes, 64, false);
extern MOEKERNELS_INSTANCE(__half, ByteCodes, 128, false);
extern MOEKERNELS_INSTANCE(__half, ByteCodes, 64, true);
extern MOEKERNELS_INSTANCE(__half, ByteCodes, 128, true);

}  // namespace moekernels
