// Rows rounded to 8 bits times a quantised weight, in integers. Each row is rounded to integers of its own scale and
// packed into tiles [blocks][tile rows][bytes]; integer sums over groups, times their scales, are added up in float32.
// Where a weight row has one scale its sums are integers to the end, and results are the same on every machine.
//
// Elements of a row that stand out (int8_threshold) count as zeros there, so that the others get finer steps. They are
// multiplied with dequantised weights and added in float32, column by column: what stands out mostly does so in the
// same few columns of all rows, whose codes are gathered once for a task.
#pragma once

#include "cpu/isa/quantized_dispatch.h"
#include "cpu/isa/quantized_integers.h"
#include "cpu/isa/quantized_product.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kIntegerRows = MOEKERNELS_TILE_REGISTERS ? 96 : 64;  // of a task
constexpr int64_t kOutlierColumns = 32;                                // whose weights are gathered at a time

// With a scale for each weight row there are fewer vectors at a time than with scales for groups.
template <bool kByRow>
constexpr int kIntegerTile = MOEKERNELS_VECTOR_BYTES != 64 ? 2
                             : kByRow                      ? 8
                                                           : 4;

constexpr int32_t kNoLimit = 0x7fffffff;  // above all numbers

MOEKERNELS_INLINE VecF magnitude_of(VecF x) {
  return VecF(VecU(x) & 0x7fffffffu);
}

// The largest magnitude of a row, or of those below a limit; NaN if there is one. Bits of magnitudes rise with them,
// and those of NaN are above all. No values: zeros.
template <bool kLimited, class T>
float largest_magnitude(const T* values, int64_t n, int32_t limit) {
  VecI most{};
  for (int64_t k = 0; values != nullptr && k < n; k += kLanes) {
    VecI bits = VecI(magnitude_of(load_n(values + k, n - k)));
    if constexpr (kLimited) bits &= bits < limit;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  return __builtin_bit_cast(float, largest);
}

// What a row is a multiple of when its largest magnitude becomes 127, and what it is multiplied with to be rounded.
struct RowScale {
  float step, inverse;

  explicit RowScale(float largest) : step(largest / 127.0f), inverse(largest > 0.0f ? 127.0f / largest : 0.0f) {}
};

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
    return {p, columns, kIntegerRows, outliers_at(p) + outlier_bytes(p, columns)};
  }

  IntegerProduct(const QuantizedGemmParams& params, const GemmTask& task, const QuantizedScratch& place, char* scratch)
      : IntegerProduct::QuantizedProduct(params, task, place, row_size(params), scratch),
        row_scales_(reinterpret_cast<float*>(scratch + kIntegerRows * row_size(params))),
        row_sums_(reinterpret_cast<int32_t*>(row_scales_ + kIntegerRows)),
        threshold_(kTakesOutliers ? params.int8_threshold : 0.0f),
        outlier_columns_(reinterpret_cast<int32_t*>(scratch + outliers_at(params))),
        outlier_weights_(reinterpret_cast<float*>(outlier_columns_ + round_up(params.gemm.in_features + 1, kLanes))) {}

  template <class T>
  void pack_rows() {
    const Parts& tiles = this->tiles_;
    int64_t tile = 0;
    round_rows<T>([&](int64_t row) {
      if (row == tiles.begin(tile + 1)) ++tile;
      constexpr int64_t kBytes = kPackedBytes<Codes, kByRow>;
      return PackedRow{this->tile_at(tile) + (row - tiles.begin(tile)) * kBytes, tiles.size(tile) * kBytes};
    });
  }

  // To the finished sums of weight rows `first` + the columns of the task. A row adds what stands out in it, from left
  // to right, and skips what stands out in others: its bits do not depend on them.
  template <class T>
  void add_outliers(int64_t first, int64_t target) {
    if constexpr (kTakesOutliers) {
      if (threshold_ == 0.0f) return;
      const GroupedGemmParams& p = this->p_;
      const GatheredRows<T> source(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
      const int64_t num_columns = outlier_columns_[0];
      for (int64_t begin = 0; begin < num_columns; begin += kOutlierColumns) {
        const int64_t n = min(kOutlierColumns, num_columns - begin);
        const int32_t* columns = outlier_columns_ + 1 + begin;
        gather_weights(first + this->task_.col_begin, columns, n);
        for (int64_t row = 0; row < this->tiles_.n; ++row) {
          const T* values = source.at(this->task_.row_begin + row, 0);
          if (values != nullptr) add_outliers(values, columns, n, this->values_of(row) + target);
        }
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

 protected:
  // Where a row is packed: a block after the other, so many bytes apart.
  struct PackedRow {
    uint8_t* target;
    int64_t stride;
  };

  // Every row of the task, each to where place(row) says.
  template <class T, class Place>
  void round_rows(const Place& place) {
    const GroupedGemmParams& p = this->p_;
    const GatheredRows<T> source(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
    bool has_outliers = false;
    for (int64_t row = 0; row < this->tiles_.n; ++row) {
      has_outliers |= pack_row(source.at(this->task_.row_begin + row, 0), row, place(row));
    }
    if constexpr (kTakesOutliers) {
      if (threshold_ > 0.0f) find_outlier_columns(source, has_outliers);
    }
  }

  float* const row_scales_;

 private:
  static constexpr bool kTakesOutliers = kByRow && Codes::kVectors == 1;

  // Where what stands out lies in the scratch: the number of its columns and they themselves, then weights of a few.
  static int64_t outliers_at(const QuantizedGemmParams& p) {
    return kIntegerRows * (row_size(p) + int64_t(sizeof(float) + sizeof(int32_t)));
  }
  static int64_t outlier_bytes(const QuantizedGemmParams& p, int64_t columns) {
    if (p.int8_threshold == 0.0f) return 0;
    return (round_up(p.gemm.in_features + 1, kLanes) + kOutlierColumns * round_up(columns, kLanes)) *
           int64_t(sizeof(float));
  }

  // At most: twice K, rounded up to whole blocks.
  static int64_t row_size(const QuantizedGemmParams& p) { return 2 * round_up(p.gemm.in_features, 2 * kVectorBytes); }

  static MOEKERNELS_INLINE VecU vector_at(const uint8_t* packed, int vector) {
    return *reinterpret_cast<const VecUBytes*>(packed + vector * kVectorBytes);
  }

  // The largest magnitude of what does not stand out becomes 127. A NaN makes the scale, and thereby the results, NaN.
  // Returns whether something stands out.
  template <class T>
  bool pack_row(const T* values, int64_t row, const PackedRow& place) {
    float largest = largest_magnitude<false>(values, this->p_.in_features, kNoLimit);
    int32_t limit = kNoLimit;
    if constexpr (kTakesOutliers) {
      if (threshold_ > 0.0f && largest >= threshold_) {
        limit = __builtin_bit_cast(int32_t, threshold_);
        largest = largest_magnitude<true>(values, this->p_.in_features, limit);
      }
    }
    const RowScale scale(largest);
    row_scales_[row] = scale.step;
    int32_t sum = 0;
    uint8_t* target = place.target;
    for (int64_t k = 0; k < this->p_.in_features; k += kBlockWeights, target += place.stride) {
      alignas(64) int8_t block[kBlockWeights] = {};
      for (int64_t i = 0; values != nullptr && i < kBlockWeights && k + i < this->p_.in_features; i += kLanes) {
        VecF x = load_n(values + k + i, this->p_.in_features - k - i);
        if constexpr (kTakesOutliers) x = VecF(VecI(x) & (VecI(magnitude_of(x)) < limit));
        store_low_bytes(block + i, rounded(x * scale.inverse));
      }
      alignas(64) int8_t ordered[kBlockWeights];
      for (int i = 0; !Codes::kInOrder && i < kBlockWeights; i += 4) {
        const int8_t* four = block + Codes::weight_at(i / kVectorBytes, i % kVectorBytes);
        *reinterpret_cast<FourBytes*>(ordered + i) = *reinterpret_cast<const FourBytes*>(four);
      }
      const int8_t* bytes = Codes::kInOrder ? block : ordered;
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
    return limit != kNoLimit;
  }

  // Those of any row of the task, in rising order.
  template <class T>
  void find_outlier_columns(const GatheredRows<T>& source, bool has_outliers) {
    int32_t count = 0;
    for (int64_t k = 0; has_outliers && k < this->p_.in_features; k += kLanes) {
      VecI found{};
      for (int64_t row = 0; row < this->tiles_.n; ++row) {
        const T* values = source.at(this->task_.row_begin + row, k);
        if (values != nullptr) found |= magnitude_of(load_n(values, this->p_.in_features - k)) >= threshold_;
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        if (found[lane] != 0) outlier_columns_[++count] = static_cast<int32_t>(k + lane);
      }
    }
    outlier_columns_[0] = count;
  }

  // The weights of columns of K, of all weight rows of the task from `weight_row` on, dequantised: [n][width].
  void gather_weights(int64_t weight_row, const int32_t* columns, int64_t n) {
    const int64_t width = this->place_.width;
    for (int64_t begin = 0; begin < width; begin += kLanes) {
      const int64_t there = min(kLanes, this->columns_ - begin);
      float scales[kLanes] = {};
      this->scales_.load_rows(weight_row + begin, there, kUnit, scales);
      for (int64_t c = 0; c < kLanes; ++c) {
        const auto* codes = reinterpret_cast<const int8_t*>(this->codes_of(weight_row + begin + min(c, there - 1)));
        for (int64_t i = 0; i < n; ++i) {
          outlier_weights_[i * width + begin + c] = static_cast<float>(codes[columns[i]]) * scales[c];
        }
      }
    }
  }

  template <class T>
  static MOEKERNELS_INLINE float number(const T& value) {
    if constexpr (kIsBFloat16<T>) {
      return widened(value);
    } else if constexpr (sizeof(T) == sizeof(float)) {
      return value;
    } else {
      return load_n(&value, 1)[0];
    }
  }

  template <class T>
  void add_outliers(const T* values, const int32_t* columns, int64_t n, float* sums) const {
    const int64_t width = this->place_.width;
    float outliers[kOutlierColumns];
    const float* weights[kOutlierColumns];
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float value = number(values[columns[i]]);
      if (!(value >= threshold_ || value <= -threshold_)) continue;
      outliers[count] = value;
      weights[count++] = outlier_weights_ + i * width;
    }
    for (int64_t c = 0; count > 0 && c < width; c += kLanes) {
      VecF sum = load(sums + c);
      for (int64_t i = 0; i < count; ++i) sum = fma(set1(outliers[i]), load(weights[i] + c), sum);
      store(sums + c, sum);
    }
  }

  int32_t* const row_sums_;
  const float threshold_;           // 0: nothing stands out
  int32_t* const outlier_columns_;  // behind their number
  float* const outlier_weights_;    // [kOutlierColumns][width]
};

// To the multiples of its scale that a row is rounded to, as products with weights that are unpacked take it.
void round_row(DType dtype, const void* row, void* target, int64_t n) {
  with_dtype(dtype, [&]<class T>() {
    const T* values = static_cast<const T*>(row);
    const RowScale scale(largest_magnitude<false>(values, n, kNoLimit));
    for (int64_t k = 0; k < n; k += kLanes) {
      const VecI integers = rounded(load_n(values + k, n - k) * scale.inverse);
      store_n(static_cast<T*>(target) + k, __builtin_convertvector(integers, VecF) * scale.step, n - k);
    }
  });
}

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
