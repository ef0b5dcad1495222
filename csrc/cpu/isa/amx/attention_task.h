// Attention of many queries by tile registers, in bfloat16.
//
//   pack keys and values                     once for all rows of the task
//   for each 32 rows
//     multiply with all keys                 float32
//     scale, bias and softmax, row by row    e^(score - largest) rounded to bfloat16, and their sum before that
//     multiply with all values               divided by the sum at last
//
// Every row is computed as if it were alone.
#pragma once

#include "cpu/isa/amx/pack.h"
#include "cpu/isa/attention_rows.h"
#include "cpu/isa/vector_math.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kAmxAttentionRows = 256;       // of a task, at most: so many share the packed keys
constexpr int64_t kAmxBlockRows = 2 * kAmxRows;  // that are computed at a time

// Offsets of what a task packs and computes, in bytes.
struct AmxAttentionScratch {
  int64_t depth_tiles, key_tiles;  // along D, and along the keys
  int64_t sums_stride;             // float32 of 16 rows: scores of all keys, then sums of all values
  int64_t values, rows, weights, sums, bytes;

  explicit AmxAttentionScratch(const AttentionParams& p)
      : depth_tiles(round_up(p.head_dim, kAmxDepth) / kAmxDepth),
        key_tiles(round_up(p.num_keys, kAmxDepth) / kAmxDepth),
        sums_stride(2 * (depth_tiles > key_tiles ? depth_tiles : key_tiles) * kAmxSums) {
    constexpr int64_t kTileBytes = kAmxElements * sizeof(BFloat16);
    values = 2 * key_tiles * depth_tiles * kTileBytes;
    rows = values + 2 * key_tiles * depth_tiles * kTileBytes;
    weights = rows + 2 * depth_tiles * kTileBytes;
    sums = weights + 2 * key_tiles * kTileBytes;
    bytes = sums + 2 * sums_stride * int64_t(sizeof(float));
  }
};

// e^x of x <= 0, precise enough for bfloat16: 2^y with the fraction of y by a polynomial. Zero where the result would
// be subnormal, which takes long. NaN stays NaN.
MOEKERNELS_INLINE VecF weight_of(VecF x) {
  const VecF y = x * 0x1.715476p+0f;
  const VecF fraction = (VecF)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF);
  const VecF power =
      polynomial(fraction, {1.0f, 0x1.62e4bap-1f, 0x1.ebdb58p-3f, 0x1.c91cdcp-5f, 0x1.27788ap-7f, 0x1.e9743p-10f});
  const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)y, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (VecF)_mm512_maskz_scalef_ps(is_normal, (__m512)power, (__m512)y);
}

class AmxAttentionTask {
 public:
  AmxAttentionTask(const AttentionParams& params, const AttentionTask& task, void* memory)
      : p_(params),
        rows_(params, task),
        scratch_(params),
        keys_(memory),
        values_(static_cast<char*>(memory) + scratch_.values),
        queries_(static_cast<char*>(memory) + scratch_.rows),
        weights_(reinterpret_cast<BFloat16*>(static_cast<char*>(memory) + scratch_.weights)),
        sums_(reinterpret_cast<float*>(static_cast<char*>(memory) + scratch_.sums)) {}

  void run() {
    keys_.pack_right(p_.num_keys, p_.head_dim, [&](int64_t key) { return rows_.key(key); });
    values_.pack_right_transposed(p_.head_dim, p_.num_keys, p_.num_keys, [&](int64_t key) { return rows_.value(key); });
    const AmxTiles tiles;
    for (int64_t begin = 0; begin < rows_.size(); begin += kAmxBlockRows) {
      num_rows_ = min(kAmxBlockRows, rows_.size() - begin);
      rows_.get(begin, num_rows_, row_);
      queries_.pack_left(num_rows_, p_.head_dim, [&](int64_t i) { return row_[i].query; });
      multiply(queries_.at(0, 0), scratch_.depth_tiles, keys_, round_up(p_.num_keys, kAmxRows) / kAmxRows);
      for (int64_t i = 0; i < num_rows_; ++i) factors_[i] = softmax(i);
      multiply(weights_, scratch_.key_tiles, values_, 2 * scratch_.depth_tiles);
      for (int64_t i = 0; i < num_rows_; ++i) store_row(i);
    }
  }

 private:
  // The block's rows, `tiles` tiles of each, times groups of columns.
  void multiply(const BFloat16* left, int64_t tiles, const AmxPacked& right, int64_t groups) {
    const AmxLeft lefts[2] = {{left, kAmxDepth, kAmxElements}, {left + tiles * kAmxElements, kAmxDepth, kAmxElements}};
    for (int64_t group = 0; group < groups; group += 2) {
      const int64_t rights = min(2, groups - group);
      const BFloat16* const columns[2] = {right.at(group, 0), right.at(group + rights - 1, 0)};
      multiply_tiles(num_rows_ > kAmxRows ? 2 : 1, rights, lefts, columns, tiles, sums_ + group * kAmxSums,
                     scratch_.sums_stride, false);
    }
  }

  // The sums of a row in the first 16 columns; the next ones lie kAmxSums further.
  float* sums_of(int64_t i) const { return sums_ + i / kAmxRows * scratch_.sums_stride + i % kAmxRows * kAmxRows; }

  // Leaves e^(score - largest) of a row as operands, and returns one over their sum.
  float softmax(int64_t i) { return row_[i].bias == nullptr ? softmax<false>(i) : softmax<true>(i); }

  template <bool kBiased>
  float softmax(int64_t i) {
    VecF largest = lowest();
    const int64_t whole = p_.num_keys / kAmxRows * kAmxRows;
    for (int64_t key = 0; key < whole; key += kAmxRows) largest = max(largest, scores<kBiased>(i, key));
    if (whole < p_.num_keys) largest = max(largest, last_scores<kBiased>(i, whole));
    const float top = _mm512_reduce_max_ps((__m512)largest);

    VecF sum{};
    BFloat16* weights = weights_ + i / kAmxRows * scratch_.key_tiles * kAmxElements + i % kAmxRows * kAmxDepth;
    const auto add_tile = [&](VecF low, VecF high) {
      sum += low + high;
      *reinterpret_cast<VecUMemory*>(weights) = (VecU)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      weights += kAmxElements;
    };
    int64_t key = 0;
    for (; key + kAmxDepth <= p_.num_keys; key += kAmxDepth) {
      add_tile(weight_of(scores<kBiased>(i, key) - top), weight_of(scores<kBiased>(i, key + kAmxRows) - top));
    }
    if (key < p_.num_keys) {
      const bool has_whole = key < whole;
      const VecF low = has_whole ? scores<kBiased>(i, key) : last_scores<kBiased>(i, key);
      const VecF high = has_whole && whole < p_.num_keys ? last_scores<kBiased>(i, whole) : lowest();
      add_tile(weight_of(low - top), weight_of(high - top));
    }
    return p_.num_keys == 0 ? 0.0f : 1.0f / _mm512_reduce_add_ps((__m512)sum);
  }

  static MOEKERNELS_INLINE VecF lowest() { return set1(-__builtin_inff()); }
  static MOEKERNELS_INLINE VecF max(VecF a, VecF b) { return b > a ? b : a; }

  // Scores of 16 keys.
  template <bool kBiased>
  MOEKERNELS_INLINE VecF scores(int64_t i, int64_t key) const {
    const VecF x = p_.scale * load(sums_of(i) + key * kAmxRows);
    return kBiased ? x + load(row_[i].bias + key) : x;
  }
  // Of fewer than 16: the others are the lowest.
  template <bool kBiased>
  MOEKERNELS_INLINE VecF last_scores(int64_t i, int64_t key) const {
    const __mmask16 is_key = __mmask16((1u << (p_.num_keys - key)) - 1);
    VecF x = p_.scale * load(sums_of(i) + key * kAmxRows);
    if (kBiased) x += load_n(row_[i].bias + key, p_.num_keys - key);
    return (VecF)_mm512_mask_mov_ps((__m512)lowest(), is_key, (__m512)x);
  }

  void store_row(int64_t i) const {
    const float* const sums = sums_of(i);
    BFloat16* const out = row_[i].out;
    for (int64_t col = 0; col < p_.head_dim; col += kAmxDepth) {
      VecF low = load(sums + col * kAmxRows), high = load(sums + col * kAmxRows + kAmxSums);
      AmxPacked::in_order(low, high);
      const int64_t n = p_.head_dim - col;
      const __mmask32 is_col = n >= kAmxDepth ? 0xffffffffu : (1u << n) - 1;
      _mm512_mask_storeu_epi16(out + col, is_col,
                               (__m512i)_mm512_cvtne2ps_pbh((__m512)(factors_[i] * high), (__m512)(factors_[i] * low)));
    }
  }

  const AttentionParams& p_;
  const AttentionRows<BFloat16> rows_;
  const AmxAttentionScratch scratch_;
  AmxPacked keys_, values_, queries_;
  BFloat16* const weights_;  // 2 groups of rows
  float* const sums_;        // likewise
  int64_t num_rows_ = 0;
  AttentionRows<BFloat16>::Row row_[kAmxBlockRows];
  float factors_[kAmxBlockRows];
};

int64_t amx_attention_scratch(const AttentionParams& params) {
  return AmxAttentionScratch(params).bytes;
}

void run_amx_attention_task(const AttentionParams& params, const AttentionTask& task, void* memory) {
  AmxAttentionTask(params, task, memory).run();
}

}  // namespace
}  // namespace moekernels::cpu
