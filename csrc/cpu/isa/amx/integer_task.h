// Rows rounded to 8 bits times codes of a quantised weight, by tile registers: 16 weight rows x 64 columns x 16 rows in
// one instruction, in integers.
//
// Codes of 16 weight rows at a time are the left operand, bytes where they lie, those of 4 bits unpacked. The rows are
// rounded as everywhere (isa/quantized_integer_kernel.h) and packed as the right operand, so sums come out as
// [weight rows][rows] and are transposed when they are finished. A weight row has one scale here, so sums are integers
// to the end, the same as on every machine. With scales for groups, sums would pass through memory for every 64 columns
// at most, which takes longer than to unpack the weights for tiles of bfloat16.
#pragma once

#include "cpu/isa/amx/tile.h"
#include "cpu/isa/quantized_integer_kernel.h"
#include "cpu/isa/transpose.h"

namespace moekernels::cpu {
namespace {

constexpr int kAmxRowBytes = kAmxStride;                    // of a tile register
constexpr int kAmxIntegerRowGroups = 6;                     // of rows: two registers of eight hold the operands
constexpr int64_t kAmxIntegerMinRows = 8;                   // of a task; fewer are multiplied by vectors
constexpr int64_t kAmxTileBytes = kAmxRows * kAmxRowBytes;  // 64 columns of 16 rows
static_assert(kIntegerRows <= kAmxIntegerRowGroups * kAmxRows);

// The codes that are read next, so many bytes of which are asked for at each step of multiplying these.
struct AmxNextCodes {
  const uint8_t* codes;
  int64_t step;

  MOEKERNELS_INLINE void fetch() {
    for (int64_t i = 0; i < step; i += 64) _mm_prefetch(reinterpret_cast<const char*>(codes + i), _MM_HINT_T1);
    codes += step;
  }
};

// Codes of 16 weight rows: where they lie in memory, or packed.
struct AmxCodes {
  const uint8_t* codes;
  int64_t row_stride, tile_stride;
};

// sums[r] = left * right[r] over `tiles` tiles, where right[r] begins `right_stride` bytes behind the one before it.
template <int kRights>
void multiply_codes(const AmxCodes& left, const uint8_t* right, int64_t right_stride, int64_t tiles, int32_t* sums,
                    AmxNextCodes next) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
  _tile_zero(0);
  if constexpr (kRights > 1) _tile_zero(1);
  if constexpr (kRights > 2) _tile_zero(2);
  if constexpr (kRights > 3) _tile_zero(3);
  if constexpr (kRights > 4) _tile_zero(4);
  if constexpr (kRights > 5) _tile_zero(5);
  const AmxCodes weights = left;
  for (int64_t i = 0; i < tiles; ++i, right += kAmxTileBytes) {
    _tile_loadd(6, weights.codes + i * weights.tile_stride, weights.row_stride);
    _tile_loadd(7, right, kAmxStride);
    _tile_dpbssd(0, 6, 7);
    if constexpr (kRights > 1) {
      _tile_loadd(7, right + right_stride, kAmxStride);
      _tile_dpbssd(1, 6, 7);
    }
    if constexpr (kRights > 2) {
      _tile_loadd(7, right + 2 * right_stride, kAmxStride);
      _tile_dpbssd(2, 6, 7);
    }
    if constexpr (kRights > 3) {
      _tile_loadd(7, right + 3 * right_stride, kAmxStride);
      _tile_dpbssd(3, 6, 7);
    }
    if constexpr (kRights > 4) {
      _tile_loadd(7, right + 4 * right_stride, kAmxStride);
      _tile_dpbssd(4, 6, 7);
    }
    if constexpr (kRights > 5) {
      _tile_loadd(7, right + 5 * right_stride, kAmxStride);
      _tile_dpbssd(5, 6, 7);
    }
    next.fetch();
  }
  _tile_stored(0, sums, kAmxStride);
  if constexpr (kRights > 1) _tile_stored(1, sums + kAmxSums, kAmxStride);
  if constexpr (kRights > 2) _tile_stored(2, sums + 2 * kAmxSums, kAmxStride);
  if constexpr (kRights > 3) _tile_stored(3, sums + 3 * kAmxSums, kAmxStride);
  if constexpr (kRights > 4) _tile_stored(4, sums + 4 * kAmxSums, kAmxStride);
  if constexpr (kRights > 5) _tile_stored(5, sums + 5 * kAmxSums, kAmxStride);
}

// 32 codes of 4 bits in halves, as integers.
MOEKERNELS_INLINE __m256i unpacked_halves(const uint8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), mask = _mm_set1_epi8(15);
  const __m256i both = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), _mm_and_si128(bytes, mask));
  return _mm256_sub_epi8(both, _mm256_set1_epi8(NibbleIntegers::kZero));
}

// Rounds rows as the product of codes in bytes with a scale for each weight row does, whatever the codes are.
class AmxIntegerProduct : public IntegerProduct<ByteIntegers, true> {
  using Rounded = IntegerProduct<ByteIntegers, true>;

 public:
  static QuantizedScratch scratch(const QuantizedGemmParams& p, int64_t columns) {
    QuantizedScratch place = Rounded::scratch(p, columns);
    place.total += left_bytes(p);
    return place;
  }

  AmxIntegerProduct(const QuantizedGemmParams& params, const GemmTask& task, const QuantizedScratch& place,
                    char* scratch)
      : Rounded(params, task, place, scratch),
        is_nibbles_(params.weight.order != CodeOrder::kBytes),
        code_bytes_(is_nibbles_ ? params.gemm.in_features / 2 : params.gemm.in_features),
        steps_(ceil_div(params.gemm.in_features, kAmxRowBytes)),
        row_groups_(ceil_div(this->tiles_.n, kAmxRows)),
        packed_rows_(reinterpret_cast<uint8_t*>(scratch)),
        left_(reinterpret_cast<uint8_t*>(scratch + place.total - left_bytes(params))) {}

  template <class T>
  void pack_rows() {
    this->template round_rows<T>([this](int64_t row) {
      uint8_t* target = packed_rows_ + row / kAmxRows * row_group_bytes() + row % kAmxRows * kAmxRowBytes;
      return typename Rounded::PackedRow{target, kAmxTileBytes};
    });
    for (uint8_t* tile = packed_rows_; tile < packed_rows_ + row_groups_ * row_group_bytes(); tile += kAmxTileBytes) {
      auto* words = reinterpret_cast<VecUMemory*>(tile);
      VecU v[kAmxRows];
      MOEKERNELS_UNROLL
      for (int i = 0; i < kAmxRows; ++i) v[i] = words[i];
      transpose(v);
      MOEKERNELS_UNROLL
      for (int i = 0; i < kAmxRows; ++i) words[i] = v[i];
    }
  }

  // Weight rows `first` + the columns of the task, to the sums of every row from `target` on.
  void multiply_columns(int64_t first, int64_t target) {
    const AmxTiles tiles;
    for (int64_t c = 0; c < this->columns_; c += kAmxRows) {
      const int64_t weight_row = first + this->task_.col_begin + c, n = min(kAmxRows, this->columns_ - c);
      float scales[kAmxRows] = {};
      this->scales_.load_rows(weight_row, n, kUnit, scales);
      multiply(left_operand(weight_row, n), scales, target + c,
               {codes_of(weight_row + kAmxRows), ceil_div(kAmxRows * code_bytes_, steps_)});
    }
  }

 private:
  const uint8_t* codes_of(int64_t weight_row) const { return this->matrix_ + weight_row * code_bytes_; }
  int64_t row_group_bytes() const { return steps_ * kAmxTileBytes; }

  static int64_t left_bytes(const QuantizedGemmParams& p) {
    return round_up(p.gemm.in_features, kAmxRowBytes) * kAmxRows;
  }

  // Codes of n weight rows: where they lie, if they are whole tiles of bytes, or packed. What is lacking of 16 rows is
  // left undefined, and so are its sums; columns from K on are zero.
  AmxCodes left_operand(int64_t weight_row, int64_t n) const {
    const int64_t k = this->p_.in_features;
    if (!is_nibbles_ && n == kAmxRows && k % kAmxRowBytes == 0) {
      return {codes_of(weight_row), code_bytes_, kAmxRowBytes};
    }
    const uint8_t* codes = codes_of(weight_row);
    for (int64_t row = 0; row < n; ++row, codes += code_bytes_) {
      uint8_t* target = left_ + row * kAmxRowBytes;
      for (int64_t i = 0; i < k; i += kAmxRowBytes, target += kAmxTileBytes) {
        if (is_nibbles_) {
          const bool is_whole = k - i > kAmxRowBytes / 2;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), unpacked_halves(codes + i / 2));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + kAmxRowBytes / 2),
                              is_whole ? unpacked_halves(codes + (i + kAmxRowBytes / 2) / 2) : __m256i{});
        } else {
          const __mmask64 mask = ~uint64_t{0} >> (kAmxRowBytes - min(kAmxRowBytes, k - i));
          _mm512_storeu_epi8(target, _mm512_maskz_loadu_epi8(mask, codes + i));
        }
      }
    }
    return {left_, kAmxRowBytes, kAmxTileBytes};
  }

  // All rows of the task at once, times all of K.
  void multiply(const AmxCodes& left, const float (&scales)[kAmxRows], int64_t target, const AmxNextCodes& next) const {
    constexpr decltype(&multiply_codes<1>) kOf[kAmxIntegerRowGroups] = {multiply_codes<1>, multiply_codes<2>,
                                                                        multiply_codes<3>, multiply_codes<4>,
                                                                        multiply_codes<5>, multiply_codes<6>};
    alignas(64) int32_t sums[kAmxIntegerRowGroups * kAmxSums];
    kOf[row_groups_ - 1](left, packed_rows_, row_group_bytes(), steps_, sums, next);
    for (int64_t r = 0; r < row_groups_; ++r) {
      VecF totals[kAmxRows];
      MOEKERNELS_UNROLL
      for (int i = 0; i < kAmxRows; ++i) {
        const int32_t* products = sums + r * kAmxSums + i * kAmxRows;
        totals[i] = __builtin_convertvector(*reinterpret_cast<const VecIMemory*>(products), VecF) * set1(scales[i]);
      }
      finish(totals, r * kAmxRows, target);
    }
  }

  // Totals [weight rows][rows] to the values of rows from `row` on.
  void finish(const VecF (&totals)[kAmxRows], int64_t row, int64_t target) const {
    VecU v[kAmxRows];
    MOEKERNELS_UNROLL
    for (int i = 0; i < kAmxRows; ++i) v[i] = VecU(totals[i]);
    transpose(v);
    for (int64_t r = 0; r < min(kAmxRows, this->tiles_.n - row); ++r) {
      store(this->values_of(row + r) + target, VecF(v[r]) * set1(this->row_scales_[row + r]));
    }
  }

  const bool is_nibbles_;
  const int64_t code_bytes_;  // of a weight row
  const int64_t steps_;       // of 64 columns
  const int64_t row_groups_;
  uint8_t* const packed_rows_;  // [row groups][steps][16 words][16 rows]
  uint8_t* const left_;         // [steps][16 weight rows][64 columns]
};

void amx_integer_gemm(const QuantizedGemmParams& params, const GemmTask& task, void* scratch) {
  const bool has_row_scales = params.weight.group >= params.gemm.in_features;
  if (!has_row_scales || task.row_end - task.row_begin < kAmxIntegerMinRows) {
    return integer_gemm(params, task, scratch);
  }
  with_dtype(params.gemm.dtype,
             [&]<class T>() { run_product<T, AmxIntegerProduct>(params, task, static_cast<char*>(scratch)); });
}

int64_t amx_integer_scratch_bytes(const QuantizedGemmParams& p, int64_t columns) {
  return AmxIntegerProduct::scratch(p, columns).total;
}

}  // namespace
}  // namespace moekernels::cpu
