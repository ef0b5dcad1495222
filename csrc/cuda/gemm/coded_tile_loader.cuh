// From the codes of a quantised weight to the tiles of weights that are multiplied.
//
// A thread widens a *run* of each step: 32 neighbouring columns of a weight row, which have one scale. K-major, the
// runs of a step are those columns of 128 weight rows; N-major (the weight transposed) 32 weight rows with 128 columns.
//   load   starts to copy the codes of a step to a slot, 16 bytes at a time, neighbouring threads along a weight row.
//          It is called with the step before, so that they are there when that one is multiplied.
//   widen  makes the tile of it: code to float32, times scale there, rounded. These are the very weights that
//          `dequantize` makes, in the places to which the loaders of plain weights bring them.
// Scales go through registers, and are asked for while the step before is widened.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.cuh"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/gemm/weight_codes.cuh"
#include "cuda/ptx/ptx.cuh"

namespace moekernels {

constexpr int kRunColumns = 32;

template <class T, class Codes, Major kMajor, int kThreads>
class CodedTileLoader {
  static constexpr bool kAlongK = kMajor == Major::kK;
  static constexpr int kRows = kAlongK ? kTiledN : kRunColumns;  // weight rows of a step
  static constexpr int kPieces = kRunColumns / Codes::kColumns;  // of a run, 16 bytes each
  static constexpr int kRowChunks = (kAlongK ? 1 : kTiledN / kRunColumns) * kPieces;
  static constexpr int kRowStep = kThreads / kRowChunks;  // between the copies of a thread, of which there are kPieces
  static_assert(sizeof(T) == 2 && kRows * kRowChunks == kThreads * kPieces && kRowStep % 8 == 0);

 public:
  static constexpr int kSlotBytes = kRows * kRowChunks * 16;

  // `feature(r)`: K-major, the weight row of row r of the tile. Else the tile begins at column `first_col`.
  template <class Feature>
  __device__ __forceinline__ CodedTileLoader(const QuantizedGemmParams& p, int32_t expert, int32_t first_col,
                                             Feature&& feature)
      : w_(p.weight), codes_(p.weight), expert_(expert) {
    const auto in_features = static_cast<int32_t>(p.gemm.in_features);
    const auto columns = kAlongK ? in_features : static_cast<int32_t>(p.gemm.out_features);
    row_bytes_ = columns / (8 / Codes::kBits);

    const int32_t chunk_col = first_col + copied_chunk() * Codes::kColumns;
    const auto* const first = static_cast<const uint8_t*>(w_.codes) + expert * w_.codes_stride;
    const int32_t chunk_byte = chunk_col / (8 / Codes::kBits);
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      const int64_t row = kAlongK ? feature(copied_row() + i * kRowStep) : copied_row();
      at_[i] = first + row * row_bytes_ + chunk_byte;
    }
    copied_left_ = kAlongK ? columns - chunk_col : chunk_col < columns ? in_features - copied_row() : 0;

    const bool whole_rows = w_.group == columns;
    shift_ = whole_rows ? 31 : 31 - __clz(static_cast<int>(w_.group));
    scales_per_row_ = whole_rows ? 1 : columns >> shift_;
    const int32_t run_col = first_col + widened_run() * kRunColumns;
    first_scale_ = (kAlongK ? static_cast<int32_t>(feature(widened_row())) : widened_row()) * scales_per_row_ +
                   (run_col >> shift_);
    left_ = kAlongK ? columns : run_col < columns ? in_features - widened_row() : 0;
    const int64_t scale_bytes = is_nested() ? 1 : is_half() ? 2 : 4;
    scales_ = static_cast<const uint8_t*>(w_.scales) + expert * w_.scales_stride * scale_bytes;
    ask_for_scale(0);
  }

  __device__ __forceinline__ void load(int step, uint32_t slot) const {
    const int begin = step * kRunColumns;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool inside = begin + (kAlongK ? 0 : i * kRowStep) < copied_left_;
      const uint8_t* const source = kAlongK ? at_[i % kSources] + step * (kRunColumns * Codes::kBits / 8)
                                            : at_[0] + (begin + i * kRowStep) * row_bytes_;
      const uint32_t target = slot + chunk_offset(copied_row(), copied_chunk()) + i * kRowStep * kRowChunks * 16;
      ptx::cp_async_16(target, inside ? source : w_.codes, inside ? 16 : 0);
    }
  }

  __device__ __forceinline__ void widen(int step, uint32_t slot, uint32_t tile) {
    constexpr int kVectors = Codes::kColumns / 8;
    const float scale = asked_scale();
    ask_for_scale(step + 1);
    const int row = widened_row();
    const uint32_t target =
        kAlongK ? tile_address(tile, row)
                : MnMajorTile<T, kTiledN>::address(tile, row) ^ static_cast<uint32_t>(widened_run() << 6);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint4 piece = ptx::ld_shared_v4(slot + chunk_offset(row, widened_run() * kPieces + i));
      // Behind the end of a row the rows to multiply with are zeros, but a scale may be infinite.
      const bool inside = !kAlongK || step * kRunColumns + i * Codes::kColumns < left_;
      const float factor = i == 0 || inside ? scale : 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        ptx::st_shared_v4(target ^ static_cast<uint32_t>((i * kVectors + v) << 4), widened(piece, v, factor));
      }
    }
  }

 private:
  static constexpr int kSources = kAlongK ? kPieces : 1;

  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int copied_row() { return thread() / kRowChunks; }
  static __device__ __forceinline__ int copied_chunk() { return thread() % kRowChunks; }
  static __device__ __forceinline__ int widened_row() { return thread() % kRows; }
  static __device__ __forceinline__ int widened_run() { return thread() / kRows; }

  // In a slot, so that neither eight threads along rows nor eight with a chunk of a row each meet in a bank.
  static __device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
    return static_cast<uint32_t>((row * kRowChunks + (chunk ^ row / (8 / kRowChunks) % kRowChunks)) * 16);
  }

  __device__ __forceinline__ bool is_nested() const { return Codes::kNested == Known::kAtRunTime && w_.map != nullptr; }
  __device__ __forceinline__ bool is_half() const {
    return Codes::kHalf == Known::kYes || (Codes::kHalf == Known::kAtRunTime && w_.scales_dtype == DType::kFloat16);
  }

  __device__ __forceinline__ void ask_for_scale(int step) {
    constexpr int kNestedGroup = 256;
    const int begin = step * kRunColumns;
    if (begin >= left_) {
      stored_ = 0;
      factor_ = offset_ = 0.0f;
      return;
    }
    const int32_t i = first_scale_ + (kAlongK ? begin >> shift_ : begin * scales_per_row_);
    if (is_nested()) {
      const int64_t group = expert_ * w_.nested_stride + i / kNestedGroup;
      stored_ = scales_[i];
      factor_ = w_.nested[group];
      offset_ = w_.offset[group];
    } else if (is_half()) {
      stored_ = reinterpret_cast<const uint16_t*>(scales_)[i];
    } else {
      stored_ = reinterpret_cast<const uint32_t*>(scales_)[i];
    }
  }

  // Without the unit of bytes, which `dequantize` multiplies with last.
  __device__ __forceinline__ float asked_scale() const {
    float value = is_half() ? unpack2<__half>(stored_).x : __uint_as_float(stored_);
    if (is_nested()) value = __fadd_rn(__fmul_rn(w_.map[stored_], factor_), offset_);
    return Codes::kBits == 8 ? value : value * w_.unit;
  }

  // Columns 8v to 8v + 7 of a piece.
  __device__ __forceinline__ uint4 widened(const uint4& piece, int v, float scale) const {
    float a[4];
    float b[4];
    scaled(piece, 2 * v, scale, a);
    scaled(piece, 2 * v + 1, scale, b);
    return {pack2<T>(a[0], a[1]), pack2<T>(a[2], a[3]), pack2<T>(b[0], b[1]), pack2<T>(b[2], b[3])};
  }

  __device__ __forceinline__ void scaled(const uint4& piece, int i, float scale, float (&values)[4]) const {
    codes_.four(piece, i, values);
#pragma unroll
    for (float& value : values) {
      value = Codes::kOffset == 0 ? value * scale : __fmaf_rn(value, scale, -Codes::kOffset * scale);
      if (Codes::kBits == 8) value *= w_.unit;
    }
  }

  const QuantizedWeightParams& w_;
  const Codes codes_;
  const int64_t expert_;
  int64_t row_bytes_;
  const uint8_t* at_[kSources];  // this thread's copies of step 0
  int32_t copied_left_;          // of columns, or of weight rows, from there on
  int32_t left_;                 // the same of what this thread widens
  const uint8_t* scales_;        // of the expert
  int32_t first_scale_;
  int32_t scales_per_row_;
  int shift_;        // column >> shift_: its group
  uint32_t stored_;  // the scale of the next step as it is in memory
  float factor_;     // and, where it is nested, what belongs to it
  float offset_;
};

}  // namespace moekernels
