// What the decode kernel reads its weights from: a plain matrix, or the codes of a quantised one.
//
// Whatever it is, a lane reads 16 bytes of a weight row at a time, a *piece*; lane 4g + q has piece q of every chunk. A
// piece is multiplied as kVectors vectors of 16 bytes in the dtype of the tokens, each of neighbouring columns.
//
//   Params                    what the kernel is launched with; gemm(params) is all of it but the weight, and
//                             is_served(params) whether the weight is one that it can read
//   kRun, kDepth, kTallTiles  how pieces are dealt to warps and kept on their way (DecodeTraits)
//   Rows<kTiles>              of one expert, the rows g and g + 8 of each tile, at this lane's next `column`:
//     load(pieces, column, begin, inside)   asks for the pieces `begin` columns on; zeros unless inside the rows
//     open(pieces, column, inside)          when they have come: these are theirs; then there are operands
//     operands(pieces, v, w)                vector v of each
//     advance(columns)
//
// A code is widened to float32 and multiplied with its scale there, and the product is rounded to the dtype of the
// tokens: the very weights that `dequantize` makes for many rows, but for a last bit before the rounding where a scale
// has two factors (a `unit` other than 1).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/gemm/expert_weight.cuh"
#include "cuda/gemm/weight_codes.cuh"
#include "cuda/ptx/ptx.cuh"
#include "moekernels/params.h"

namespace moekernels {

// ---- a plain matrix, in the dtype of the tokens ----

template <class T, int kTiles>
class PlainRows {
 public:
  using Pieces = uint4[kTiles][2];

  // `row_of(tile, half)` says which rows they are.
  template <class RowOf>
  __device__ __forceinline__ PlainRows(const GroupedGemmParams& p, int32_t expert, int32_t column, const RowOf& row_of)
      : policy_(ptx::createpolicy_evict_first()) {
    const ExpertWeight<T, true> weight(p, expert);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) at_[m][half] = weight.row(row_of(m, half)) + column;
    }
  }

  __device__ __forceinline__ void load(Pieces& pieces, int32_t, int begin, bool inside) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        pieces[m][half] = inside ? ptx::ld_global_nc_v4_hint(at_[m][half] + begin, policy_) : uint4{0, 0, 0, 0};
      }
    }
  }

  __device__ __forceinline__ void open(Pieces&, int32_t, bool) const {}

  __device__ __forceinline__ void operands(const Pieces& pieces, int, uint4 (&w)[kTiles][2]) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) w[m][half] = pieces[m][half];
    }
  }

  __device__ __forceinline__ void advance(int columns) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      at_[m][0] += columns;
      at_[m][1] += columns;
    }
  }

 private:
  const T* at_[kTiles][2];
  uint64_t policy_;
};

template <class T>
struct PlainWeight {
  using Type = T;
  using Params = GroupedGemmParams;
  static constexpr int kVectors = 1;
  static constexpr int kRun = 2;
  static constexpr int kDepth = 4;
  static constexpr int kTallTiles = 2;
  template <int kTiles>
  using Rows = PlainRows<T, kTiles>;
  static __host__ __device__ const GroupedGemmParams& gemm(const Params& p) { return p; }
  static bool is_served(const Params&) { return true; }
};

// ---- a quantised weight ----

template <class T, class Codes, int kTiles>
class CodedRows {
 public:
  // The scale as it is in memory, then, once opened, in float32: a piece lies in one group.
  struct Piece {
    uint4 codes;
    uint32_t scale;
  };
  using Pieces = Piece[kTiles][2];

  template <class RowOf>
  __device__ __forceinline__ CodedRows(const QuantizedGemmParams& p, int32_t expert, int32_t column,
                                       const RowOf& row_of)
      : w_(p.weight), codes_(p.weight), expert_(expert), policy_(ptx::createpolicy_evict_first()) {
    const int64_t row_bytes = p.gemm.in_features * Codes::kBits / 8;
    const auto* const first = static_cast<const uint8_t*>(w_.codes) + expert_ * w_.codes_stride;
    const bool whole_rows = w_.group == p.gemm.in_features;
    shift_ = whole_rows ? 31 : 31 - __clz(static_cast<int>(w_.group));
    const int32_t per_row = whole_rows ? 1 : static_cast<int32_t>(p.gemm.in_features) >> shift_;
    const int64_t scale_bytes = is_nested() ? 1 : is_half() ? 2 : 4;
    scales_ = static_cast<const uint8_t*>(w_.scales) + expert_ * w_.scales_stride * scale_bytes;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = row_of(m, half);
        at_[m][half] = first + row * row_bytes + column * Codes::kBits / 8;
        first_scale_[m][half] = row * per_row;
      }
    }
  }

  __device__ __forceinline__ void load(Pieces& pieces, int32_t column, int begin, bool inside) const {
    const int32_t group = (column + begin) >> shift_;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Piece& piece = pieces[m][half];
        piece.codes =
            inside ? ptx::ld_global_nc_v4_hint(at_[m][half] + begin * Codes::kBits / 8, policy_) : uint4{0, 0, 0, 0};
        piece.scale = inside ? stored_scale(first_scale_[m][half] + group) : 0;
      }
    }
  }

  __device__ __forceinline__ void open(Pieces& pieces, int32_t column, bool inside) const {
    const int32_t group = column >> shift_;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Piece& piece = pieces[m][half];
        piece.scale = __float_as_uint(scale(piece.scale, first_scale_[m][half] + group, inside));
      }
    }
  }

  __device__ __forceinline__ void operands(const Pieces& pieces, int vector, uint4 (&w)[kTiles][2]) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) w[m][half] = operand(pieces[m][half], vector);
    }
  }

  __device__ __forceinline__ void advance(int columns) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      at_[m][0] += columns * Codes::kBits / 8;
      at_[m][1] += columns * Codes::kBits / 8;
    }
  }

 private:
  __device__ __forceinline__ bool is_nested() const {
    return Codes::kNested == Known::kYes || (Codes::kNested == Known::kAtRunTime && w_.map != nullptr);
  }
  __device__ __forceinline__ bool is_half() const {
    return Codes::kHalf == Known::kYes ||
           (Codes::kHalf == Known::kAtRunTime && w_.scales_dtype == DType::kFloat16 && !is_nested());
  }

  // Scale i of the expert.
  __device__ __forceinline__ uint32_t stored_scale(int32_t i) const {
    if (is_nested()) return scales_[i];
    if (is_half()) return reinterpret_cast<const uint16_t*>(scales_)[i];
    return reinterpret_cast<const uint32_t*>(scales_)[i];
  }

  __device__ __forceinline__ float scale(uint32_t stored, int32_t i, bool inside) const {
    constexpr int kNestedGroup = 256;
    float value = __uint_as_float(stored);
    if (is_nested()) {
      const int64_t group = expert_ * w_.nested_stride + i / kNestedGroup;
      value = inside ? __fadd_rn(__fmul_rn(w_.map[stored], w_.nested[group]), w_.offset[group]) : 0.0f;
    } else if (is_half()) {
      value = unpack2<__half>(stored).x;
    }
    return value * w_.unit;
  }

  __device__ __forceinline__ void scaled(const Piece& piece, int i, float (&values)[4]) const {
    const float scale = __uint_as_float(piece.scale);
    codes_.four(piece.codes, i, values);
#pragma unroll
    for (float& value : values) {
      value = Codes::kOffset == 0 ? value * scale : __fmaf_rn(value, scale, -Codes::kOffset * scale);
    }
  }

  __device__ __forceinline__ uint4 operand(const Piece& piece, int vector) const {
    float a[4];
    if constexpr (std::is_same_v<T, float>) {
      scaled(piece, vector, a);
      return {__float_as_uint(a[0]), __float_as_uint(a[1]), __float_as_uint(a[2]), __float_as_uint(a[3])};
    } else {
      float b[4];
      scaled(piece, 2 * vector, a);
      scaled(piece, 2 * vector + 1, b);
      return {pack2<T>(a[0], a[1]), pack2<T>(a[2], a[3]), pack2<T>(b[0], b[1]), pack2<T>(b[2], b[3])};
    }
  }

  const QuantizedWeightParams& w_;
  const Codes codes_;
  const int64_t expert_;
  const uint8_t* at_[kTiles][2];
  const uint8_t* scales_;  // of the expert
  int32_t first_scale_[kTiles][2];
  int shift_;  // column >> shift_: its group
  uint64_t policy_;
};

template <class T, class Codes>
struct CodedWeight {
  using Type = T;
  using Params = QuantizedGemmParams;
  static constexpr int kVectors = Codes::kColumns / Vec16<T>::kSize;
  static constexpr int kRun = 1;    // rows are short
  static constexpr int kDepth = 2;  // a piece is as many columns as two or four plain ones
  static constexpr int kTallTiles = 1;
  template <int kTiles>
  using Rows = CodedRows<T, Codes, kTiles>;
  static __host__ __device__ const GroupedGemmParams& gemm(const Params& p) { return p.gemm; }
  // Scales of an expert are counted in 32 bits.
  static bool is_served(const Params& p) {
    return is_known<Codes>(p.weight) && !p.int8_rows &&
           p.gemm.out_features * (p.gemm.in_features / p.weight.group) <= INT32_MAX &&
           is_vec16_aligned<uint8_t>(p.weight.codes, p.weight.codes_stride);
  }
};

template <class T>
using HalvesWeight = CodedWeight<T, HalvesCodes>;
template <class T>
using PairsWeight = CodedWeight<T, PairCodes>;
template <class T>
using BytesWeight = CodedWeight<T, ByteCodes>;

}  // namespace moekernels
