// Few rows times a quantised weight, whose codes are widened in registers while they stream by. Rows are packed in the
// order in which a block of codes comes apart, into tiles [vectors of K][tile rows][vector]; a sum over a block, times
// its scales, is added to the sums.
#pragma once

#include "cpu/isa/quantized_dispatch.h"
#include "cpu/isa/quantized_product.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kQuantizedRows = MOEKERNELS_NATIVE_BFLOAT16 ? 16 : 8;  // of a task

template <class Codes>
constexpr bool kPairs = sizeof(typename Codes::Dot::Packed) == 2;
template <class Codes>
constexpr int kWideningTile = kPairs<Codes>                   ? 8
                              : MOEKERNELS_VECTOR_BYTES == 64 ? 4
                                                              : 2;
// Vectors of registers that a block of widened codes may take, and totals of four weight rows.
template <class Codes>
constexpr int kWidenedVectors = kPairs<Codes> ? 16 : 8;
template <class Codes>
constexpr int kTotalsOfFour = kPairs<Codes>                   ? 16
                              : MOEKERNELS_VECTOR_BYTES == 64 ? 8
                                                              : 4;

template <class Codes>
class WideningProduct : public QuantizedProduct<WideningProduct<Codes>, Codes, typename Codes::Dot::Packed, VecF, float,
                                                kWideningTile<Codes>, Codes::kVectors * Codes::kVectorWeights,
                                                Codes::kVectors * Codes::kVectorWeights> {
  using Dot = typename Codes::Dot;
  using Packed = typename Dot::Packed;
  static constexpr int kVectorWeights = Codes::kVectorWeights;
  static constexpr int kBlockWeights = Codes::kVectors * kVectorWeights;

 public:
  static constexpr float kUnit = Codes::kUnit;
  static constexpr bool kScaledSums = false;
  template <int kRows>
  static constexpr int kCols = 4 * kRows <= kTotalsOfFour<Codes> ? 4 : 2;

  // The same whatever the codes: rows are rounded up to whole blocks of any.
  static QuantizedScratch scratch(const QuantizedGemmParams& p, int64_t columns) {
    return {p, columns, kQuantizedRows, kQuantizedRows * row_size(p) * int64_t(sizeof(float))};
  }

  WideningProduct(const QuantizedGemmParams& params, const GemmTask& task, const QuantizedScratch& place, char* scratch)
      : WideningProduct::QuantizedProduct(params, task, place, row_size(params), scratch), codes_(params.weight) {}

  template <class T>
  void pack_rows() {
    const GroupedGemmParams& p = this->p_;
    const Parts& tiles = this->tiles_;
    const GatheredRows<T> source(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t rows = tiles.size(tile);
      for (int64_t r = 0; r < rows; ++r) {
        const T* values = source.at(this->task_.row_begin + tiles.begin(tile) + r, 0);
        Packed* target = this->tile_at(tile) + r * kVectorWeights;
        for (int64_t k = 0; k < p.in_features; k += kBlockWeights) {
          Packed block[kBlockWeights] = {};
          if (values != nullptr) widen_block(values + k, p.in_features - k, block);
          MOEKERNELS_UNROLL
          for (int s = 0; s < Codes::kVectors; ++s, target += rows * kVectorWeights) {
            MOEKERNELS_UNROLL
            for (int i = 0; i < kVectorWeights; ++i) target[i] = block[Codes::weight_at(s, i)];
          }
        }
      }
    }
  }

  template <int kCols, int kRows>
  MOEKERNELS_INLINE void add_block(const uint8_t* const (&weight)[kCols], const float* const (&scales)[kCols],
                                   int64_t block, const Packed* x, VecF (&totals)[kCols * kRows]) const {
    // Columns whose widened codes there are registers for: each vector of rows is loaded once for all of them.
    constexpr int kMost = kWidenedVectors<Codes> / Codes::kVectors;
    constexpr int kTogether = kMost < kCols ? kMost : kCols;
    MOEKERNELS_UNROLL
    for (int first = 0; first < kCols; first += kTogether) {
      if constexpr (kRows > 2) asm volatile("" ::: "memory");  // or rows would be kept in registers that are not there
      typename Dot::Operand w[kTogether][Codes::kVectors];
      VecF scale[kTogether];
      MOEKERNELS_UNROLL
      for (int c = 0; c < kTogether; ++c) {
        const typename Codes::Block codes = codes_.block(weight[first + c]);
        MOEKERNELS_UNROLL
        for (int s = 0; s < Codes::kVectors; ++s) w[c][s] = codes_.value(codes, s);
        scale[c] = this->scales_of_lanes(scales[first + c], block);
      }
      MOEKERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        VecF sums[kTogether] = {};
        MOEKERNELS_UNROLL
        for (int s = 0; s < Codes::kVectors; ++s) {
          const typename Dot::Operand operand = Dot::packed(x + (s * kRows + r) * kVectorWeights, 0);
          MOEKERNELS_UNROLL
          for (int c = 0; c < kTogether; ++c) sums[c] = Dot::multiply_add(w[c][s], operand, sums[c]);
        }
        MOEKERNELS_UNROLL
        for (int c = 0; c < kTogether; ++c) {
          VecF& total = totals[r * kCols + first + c];
          total = fma(scale[c], sums[c], total);
        }
      }
    }
  }

  static MOEKERNELS_INLINE void add_lanes(const VecF (&four)[4], float* sums) {
    reduce_4(four[0], four[1], four[2], four[3], sums, false);
  }
  static MOEKERNELS_INLINE void finish_sums(float*, int64_t, int64_t, int64_t) {}

 private:
  static int64_t row_size(const QuantizedGemmParams& p) { return round_up(p.gemm.in_features, kMostVectors * kLanes); }

  template <class T>
  static MOEKERNELS_INLINE void widen_block(const T* values, int64_t n, Packed* block) {
    if constexpr (sizeof(T) == sizeof(Packed)) {  // of the same type
      for (int64_t i = 0; i < kBlockWeights; ++i) {
        if (i < n) block[i] = values[i];
      }
    } else {
      for (int64_t i = 0; i < kBlockWeights && i < n; i += kLanes) store(block + i, load_n(values + i, n - i));
    }
  }

  const Codes codes_;
};

int64_t quantized_scratch_bytes(const QuantizedGemmParams& p, int64_t columns) {
  return WideningProduct<SignedBytes<1>>::scratch(p, columns).total;
}

void quantized_gemm(const QuantizedGemmParams& params, const GemmTask& task, void* scratch) {
  with_dtype(params.gemm.dtype, [&]<class T>() {
    with_codes<T>(params.weight, [&]<class Codes>() {
      run_product<T, WideningProduct<Codes>>(params, task, static_cast<char*>(scratch));
    });
  });
}

}  // namespace
}  // namespace moekernels::cpu
