// float32 by tile registers: each value is split into three bfloat16 parts, of which the products that matter are added
// up.
//
//   x = x0 + x1 + x2             the next 8 significant bits each: exact, unless they are subnormal
//   x y = x2 y0 + x1 y0 + x1 y1 + x0 y1 + x0 y2 + x0 y0      what is left out is below 2^-21 |x y|
//
// Six products, each at sixteen times the rate of vector instructions. The parts of an infinity are not numbers: where
// a sum is NaN (NanCheck), the task is done again by the vector kernel.
//
// Packed operands are groups of 16 rows (left) or columns (right): for each 32 elements of K the tiles of the three
// parts, one after the other. A word of a tile holds elements i and i + 16 of these 32, so that splitting needs no
// shuffles.
//
// This file splits and packs. Operands that are used again and again are packed by functions; those that stream through
// by objects that go on step by step, so that vector instructions work while tiles are multiplied.
#pragma once

#include "cpu/isa/amx/tile.h"
#include "cpu/isa/parts.h"
#include "cpu/isa/transpose.h"

namespace moekernels::cpu {
namespace {

constexpr int kSplitParts = 3;
constexpr int64_t kSplitChunk = 128;  // elements of K: a pair of packed groups takes half of the first-level cache
constexpr int64_t kSplitTile = kSplitParts * kAmxElements;

// The parts of 32 elements of K.
MOEKERNELS_INLINE void split(VecF low, VecF high, VecU (&parts)[kSplitParts]) {
  constexpr uint32_t kUpperHalf = 0xffff0000u;
  constexpr uint64_t kLowerHalves = 0x3333333333333333u;  // of words, by bytes
  MOEKERNELS_UNROLL
  for (int part = 0; part < kSplitParts; ++part) {
    parts[part] = (VecU)_mm512_mask_alignr_epi8((__m512i)high, kLowerHalves, (__m512i)low, (__m512i)low, 2);
    low -= VecF(VecU(low) & kUpperHalf);
    high -= VecF(VecU(high) & kUpperHalf);
  }
}

MOEKERNELS_INLINE void store_parts(BFloat16* to, const VecU (&parts)[kSplitParts]) {
  MOEKERNELS_UNROLL
  for (int part = 0; part < kSplitParts; ++part) *reinterpret_cast<VecUMemory*>(to + part * kAmxElements) = parts[part];
}

// Which of 32 elements are among the first n.
MOEKERNELS_INLINE uint32_t first_lanes(int64_t n) {
  return n >= kAmxDepth ? ~0u : n <= 0 ? 0 : (1u << n) - 1;
}

// 16 elements of a row from i on; null, and those that are not in `lanes`: zeros, not read.
MOEKERNELS_INLINE VecU lanes_from(const float* row, int64_t i, uint32_t lanes) {
  if (row == nullptr) return VecU{};
  return VecU(VecF(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), row + i)));
}

// Splits the elements of 32 that are among `lanes`; the others become zeros and are not read.
MOEKERNELS_INLINE void split_row(const float* row, uint32_t lanes, BFloat16* to) {
  VecU parts[kSplitParts];
  split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), row),
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> kLanes), row + kLanes), parts);
  store_parts(to, parts);
}

// Whether any of the values it has seen is NaN.
class NanCheck {
 public:
  MOEKERNELS_INLINE void see(VecF v) { seen_ |= v != v; }
  bool found() const { return _mm512_test_epi32_mask((__m512i)seen_, (__m512i)seen_) != 0; }

 private:
  VecI seen_{};
};

// Packed groups in scratch memory, all of as many tiles as n elements of K fill.
class SplitPacked {
 public:
  SplitPacked(void* memory, int64_t n) : packed_(static_cast<BFloat16*>(memory)), tiles_(ceil_div(n, kAmxDepth)) {}

  int64_t tiles() const { return tiles_; }
  BFloat16* at(int64_t group, int64_t tile) const { return packed_ + (group * tiles_ + tile) * kSplitTile; }

 private:
  BFloat16* packed_;
  int64_t tiles_;
};

// A left operand: rows source(row)[0 .. n); null: zeros.
template <class Source>
void split_left(SplitPacked target, int64_t rows, int64_t n, const Source& source) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = source(row);
    BFloat16* to = target.at(row / kAmxRows, 0) + row % kAmxRows * kAmxDepth;
    for (int64_t k = 0; k < n; k += kAmxDepth, to += kSplitTile) {
      split_row(from + k, from == nullptr ? 0 : first_lanes(n - k), to);
    }
  }
}

// A right operand, MN-major: column c is source(k)[c] for k in [0, n); null: zeros. Each step splits elements i and
// i + 16 of K of 16 columns.
template <class Source>
class SplitMnMajor {
 public:
  SplitMnMajor(SplitPacked target, int64_t cols, int64_t n, const Source& source)
      : source_(source),
        target_(target),
        groups_(ceil_div(cols, kAmxRows)),
        n_(n),
        tail_(first_lanes(cols - (groups_ - 1) * kAmxRows)),
        left_(target.tiles() * kAmxRows * groups_) {
    if (left_ > 0) find_rows();
  }

  int64_t steps_left() const { return left_; }

  MOEKERNELS_INLINE void step(int64_t count) {
    for (; count > 0 && left_ > 0; --count) {
      VecU parts[kSplitParts];
      const uint32_t lanes = in_row_ == 1 ? tail_ : ~0u;
      split(VecF(lanes_from(low_, 0, lanes)), VecF(lanes_from(high_, 0, lanes)), parts);
      store_parts(to_, parts);
      low_ = low_ == nullptr ? nullptr : low_ + kAmxRows;
      high_ = high_ == nullptr ? nullptr : high_ + kAmxRows;
      to_ += target_.tiles() * kSplitTile;
      --left_;
      if (--in_row_ == 0 && left_ > 0) find_rows();
    }
  }

  void finish() { step(left_); }

 private:
  __attribute__((noinline)) void find_rows() {
    const int64_t tile = pair_ / kAmxRows, i = pair_ % kAmxRows, k = tile * kAmxDepth + i;
    low_ = k < n_ ? source_(k) : nullptr;
    high_ = k + kLanes < n_ ? source_(k + kLanes) : nullptr;
    to_ = target_.at(0, tile) + i * kAmxDepth;
    in_row_ = groups_;
    ++pair_;
  }

  const Source source_;
  const SplitPacked target_;
  const int64_t groups_, n_;
  const uint32_t tail_;
  int64_t left_, in_row_ = 0, pair_ = 0;
  const float *low_ = nullptr, *high_ = nullptr;
  BFloat16* to_ = nullptr;
};

// A tile's parts from 32 MN-major vectors: `low` the first 16 and `high` the others, in the order in which a
// transposition leaves them.
MOEKERNELS_INLINE void store_transposed(BFloat16* to, VecU (&low)[kAmxRows], VecU (&high)[kAmxRows]) {
  transpose(low);
  transpose(high);
  for (int i = 0; i < kAmxRows; ++i, to += kAmxDepth) {
    VecU parts[kSplitParts];
    split(VecF(low[i]), VecF(high[i]), parts);
    store_parts(to, parts);
  }
}

// A right operand, K-major: column c is source(c)[0 .. n); null: zeros.
template <class Source>
void split_right(SplitPacked target, int64_t cols, int64_t n, const Source& source) {
  for (int64_t first = 0; first < cols; first += kAmxRows) {
    const float* rows[kAmxRows];
    for (int64_t c = 0; c < kAmxRows; ++c) rows[c] = first + c < cols ? source(first + c) : nullptr;
    for (int64_t tile = 0; tile < target.tiles(); ++tile) {
      const int64_t k = tile * kAmxDepth;
      const uint32_t lanes = first_lanes(n - k);
      VecU low[kAmxRows], high[kAmxRows];
      for (int c = 0; c < kAmxRows; ++c) {
        low[c] = lanes_from(rows[c], k, lanes);
        high[c] = lanes_from(rows[c], k + kLanes, lanes >> kLanes);
      }
      store_transposed(target.at(first / kAmxRows, tile), low, high);
    }
  }
}

// A left operand, MN-major: row r is source(k)[r] for k in [0, n); null: zeros.
template <class Source>
void split_left_mn_major(SplitPacked target, int64_t rows, int64_t n, const Source& source) {
  for (int64_t tile = 0; tile < target.tiles(); ++tile) {
    const float* lines[kAmxDepth];
    for (int64_t i = 0; i < kAmxDepth; ++i)
      lines[i] = tile * kAmxDepth + i < n ? source(tile * kAmxDepth + i) : nullptr;
    for (int64_t row = 0; row < rows; row += kAmxRows) {
      const uint32_t lanes = first_lanes(rows - row);
      VecU low[kAmxRows], high[kAmxRows];
      for (int i = 0; i < kAmxRows; ++i) {
        low[i] = lanes_from(lines[i], row, lanes);
        high[i] = lanes_from(lines[i + kLanes], row, lanes);
      }
      store_transposed(target.at(row / kAmxRows, tile), low, high);
    }
  }
}

}  // namespace
}  // namespace moekernels::cpu
