// Rows rounded to 8 bits times a quantised weight, in integers. Each row is rounded to integers of its own scale and
// packed into tiles [blocks][tile rows][bytes]; integer sums over groups, times their scales, are added up in float32.
// Where a weight row has one scale its sums are integers to the end, and results are the same on every machine.
#pragma once

#include "cpu/isa/quantized_dispatch.h"
#include "cpu/isa/quantized_integers.h"
#include "cpu/isa/quantized_product.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kIntegerRows = 64;  // of a task

// With a scale for each weight row there are fewer vectors at a time than with scales for groups.
template <bool kByRow>
constexpr int kIntegerTile = MOEKERNELS_VECTOR_BYTES != 64 ? 2
                             : kByRow                      ? 8
                                                           : 4;

// kByRow: a scale for each weight row; else for groups of it.
template <bool kByRow>
struct IntegerSums {
  using Vector = VecF;
  using Scalar = float;
};
template <>
struct IntegerSums<true> {
  using Vector = VecI;
  using Scalar = int32_t;
};

// Of a packed block: the vectors of its codes, and without a scale for each weight row what to start with.
template <class Codes, bool kByRow>
constexpr int kPackedBytes = (Codes::kVectors + (kByRow ? 0 : 1)) * kVectorBytes;

template <class Codes, bool kByRow>
class IntegerProduct
    : public QuantizedProduct<IntegerProduct<Codes, kByRow>, Codes, uint8_t, typename IntegerSums<kByRow>::Vector,
                              typename IntegerSums<kByRow>::Scalar, kIntegerTile<kByRow>,
                              Codes::kVectors * kVectorBytes, kPackedBytes<Codes, kByRow>> {
  static constexpr int kBlockWeights = Codes::kVectors * kVectorBytes;
  using Sums = typename IntegerSums<kByRow>::Vector;
  using Sum = typename IntegerSums<kByRow>::Scalar;

 public:
  static constexpr float kUnit = 1.0f;
  static constexpr bool kScaledSums = kByRow;
  template <int kRows>
  static constexpr int kCols = kRows == 1 || (kRows <= 4 && MOEKERNELS_VECTOR_BYTES == 64) ? 4 : 2;

  // The same whatever the codes.
  static QuantizedScratch scratch(const QuantizedGemmParams& p, int64_t columns) {
    return {p, columns, kIntegerRows, kIntegerRows * (row_size(p) + int64_t(sizeof(float) + sizeof(int32_t)))};
  }

  IntegerProduct(const QuantizedGemmParams& params, const GemmTask& task, const QuantizedScratch& place, char* scratch)
      : IntegerProduct::QuantizedProduct(params, task, place, row_size(params), scratch),
        row_scales_(reinterpret_cast<float*>(scratch + kIntegerRows * row_size(params))),
        row_sums_(reinterpret_cast<int32_t*>(row_scales_ + kIntegerRows)) {}

  template <class T>
  void pack_rows() {
    const GroupedGemmParams& p = this->p_;
    const Parts& tiles = this->tiles_;
    const GatheredRows<T> source(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      for (int64_t r = 0; r < tiles.size(tile); ++r) {
        const int64_t row = tiles.begin(tile) + r;
        pack_row(source.at(this->task_.row_begin + row, 0), row, this->tile_at(tile) + r * kPackedBytes<Codes, kByRow>,
                 tiles.size(tile) * kPackedBytes<Codes, kByRow>);
      }
    }
  }

  template <int kCols, int kRows>
  MOEKERNELS_INLINE void add_block(const uint8_t* const (&weight)[kCols], const float* const (&scales)[kCols],
                                   int64_t block, const uint8_t* x, Sums (&totals)[kCols * kRows]) const {
    if constexpr (kRows > 2) asm volatile("" ::: "memory");  // or rows would be kept in registers that are not there
    VecU w[kCols][Codes::kVectors];
    VecF scale[kCols] = {};
    MOEKERNELS_UNROLL
    for (int c = 0; c < kCols; ++c) {
      MOEKERNELS_UNROLL
      for (int s = 0; s < Codes::kVectors; ++s) w[c][s] = Codes::value(weight[c], s);
      if constexpr (!kByRow) scale[c] = this->scales_of_lanes(scales[c], block);
    }
    MOEKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* packed = x + r * kPackedBytes<Codes, kByRow>;
      VecU operand[Codes::kVectors];
      MOEKERNELS_UNROLL
      for (int s = 0; s < Codes::kVectors; ++s) operand[s] = loaded_once(vector_at(packed, s));
      VecI start{};
      if constexpr (!kByRow) start = VecI(loaded_once(vector_at(packed, Codes::kVectors)));
      MOEKERNELS_UNROLL
      for (int c = 0; c < kCols; ++c) {
        Sums& total = totals[r * kCols + c];
        VecI sum;
        if constexpr (kByRow) {
          sum = total;
        } else {
          sum = start;
        }
        MOEKERNELS_UNROLL
        for (int s = 0; s < Codes::kVectors; ++s) sum = dot_bytes<2 * Codes::kZero - 1>(w[c][s], operand[s], sum);
        if constexpr (kByRow) {
          total = sum;
        } else {
          total = fma(scale[c], __builtin_convertvector(sum, VecF), total);
        }
      }
    }
  }

  static MOEKERNELS_INLINE void add_lanes(const Sums (&four)[4], Sum* sums) {
    if constexpr (kByRow) {
      reduce_4(four[0], four[1], four[2], four[3], sums);
    } else {
      reduce_4(four[0], four[1], four[2], four[3], sums, false);
    }
  }

  // The codes of zero are taken off.
  void finish_sums(Sum* sums, int64_t n, int64_t row, int64_t weight_row) const {
    for (int64_t c = 0; c < n; c += kLanes) {
      VecF value;
      if constexpr (kByRow) {
        float scales[kLanes] = {};
        this->scales_.load_rows(weight_row + c, min(kLanes, n - c), kUnit, scales);
        const VecI products = *reinterpret_cast<const VecIMemory*>(sums + c) - Codes::kZero * row_sums_[row];
        value = __builtin_convertvector(products, VecF) * load(scales);
      } else {
        value = load(sums + c);
      }
      *reinterpret_cast<VecFMemory*>(sums + c) = value * row_scales_[row];
    }
  }

 private:
  // At most: twice K, rounded up to whole blocks.
  static int64_t row_size(const QuantizedGemmParams& p) { return 2 * round_up(p.gemm.in_features, 2 * kVectorBytes); }

  static MOEKERNELS_INLINE VecU vector_at(const uint8_t* packed, int vector) {
    return *reinterpret_cast<const VecUBytes*>(packed + vector * kVectorBytes);
  }

  // The largest magnitude becomes 127. A NaN makes the scale, and thereby the results, NaN.
  template <class T>
  void pack_row(const T* values, int64_t row, uint8_t* target, int64_t stride) {
    VecF most{};
    for (int64_t k = 0; values != nullptr && k < this->p_.in_features; k += kLanes) {
      const VecF x = load_n(values + k, this->p_.in_features - k);
      const VecF magnitude = VecF(VecU(x) & 0x7fffffffu);
      most = (magnitude > most) | (x != x) ? magnitude : most;
    }
    float largest = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (largest == largest && !(most[lane] <= largest)) largest = most[lane];
    }
    row_scales_[row] = largest / 127.0f;
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int64_t k = 0; k < this->p_.in_features; k += kBlockWeights, target += stride) {
      alignas(64) int8_t block[kBlockWeights] = {};
      for (int64_t i = 0; values != nullptr && i < kBlockWeights && k + i < this->p_.in_features; i += kLanes) {
        store_low_bytes(block + i, rounded(load_n(values + k + i, this->p_.in_features - k - i) * inverse));
      }
      alignas(64) int8_t bytes[kBlockWeights];
      for (int i = 0; i < kBlockWeights; i += 4) {
        const int8_t* four = block + Codes::weight_at(i / kVectorBytes, i % kVectorBytes);
        *reinterpret_cast<FourBytes*>(bytes + i) = *reinterpret_cast<const FourBytes*>(four);
      }
      VecI sums{};
      for (int s = 0; s < Codes::kVectors; ++s) {
        const VecU x = *reinterpret_cast<const VecUBytes*>(bytes + s * kVectorBytes);
        *reinterpret_cast<VecUBytes*>(target + s * kVectorBytes) = x;
        sums = dot_bytes<15>(VecU{} + 0x01010101u, x, sums);
      }
      if constexpr (kByRow) {
        sum += sum_of(sums);
      } else {
        *reinterpret_cast<VecUBytes*>(target + Codes::kVectors * kVectorBytes) = VecU(sums * -Codes::kZero);
      }
    }
    row_sums_[row] = sum;
  }

  float* const row_scales_;
  int32_t* const row_sums_;
};

template <class T>
void integer_task(const QuantizedGemmParams& params, const GemmTask& task, char* scratch) {
  const bool by_row = params.weight.group >= params.gemm.in_features;
  if (params.weight.order == CodeOrder::kBytes) {
    if (by_row) return run_product<T, IntegerProduct<ByteIntegers, true>>(params, task, scratch);
    return run_product<T, IntegerProduct<ByteIntegers, false>>(params, task, scratch);
  }
  if (by_row) return run_product<T, IntegerProduct<NibbleIntegers, true>>(params, task, scratch);
  run_product<T, IntegerProduct<NibbleIntegers, false>>(params, task, scratch);
}

void integer_gemm(const QuantizedGemmParams& params, const GemmTask& task, void* scratch) {
  with_dtype(params.gemm.dtype, [&]<class T>() { integer_task<T>(params, task, static_cast<char*>(scratch)); });
}

int64_t integer_scratch_bytes(const QuantizedGemmParams& p, int64_t columns) {
  return IntegerProduct<ByteIntegers, true>::scratch(p, columns).total;
}

}  // namespace
}  // namespace moekernels::cpu
