// matrix [M, N] -> out [N, M]
//
// Squares of which a row is a line of the cache, through memory of their own: rows that lie a power of two apart share
// so few places in the cache that a line which is touched more than once would not stay.
#include <algorithm>
#include <cstring>

#include "common/rounding.h"
#include "cpu/parallel.h"

namespace moekernels {
namespace {

constexpr int64_t kLine = 64;  // bytes

// Vectors that every machine has.
template <class Word>
struct VectorOf;

template <>
struct VectorOf<uint16_t> {
  typedef uint16_t Type __attribute__((vector_size(16)));
  static Type low(Type a, Type b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static Type high(Type a, Type b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
};

template <>
struct VectorOf<uint32_t> {
  typedef uint32_t Type __attribute__((vector_size(16)));
  static Type low(Type a, Type b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static Type high(Type a, Type b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
};

// A square of one vector's width. Rows interleaved with those half of it further down, once for each bit of an index,
// are columns.
template <class Word>
void transpose_square(const Word* source, int64_t source_stride, Word* target, int64_t target_stride) {
  using Vector = VectorOf<Word>;
  constexpr int kSize = 16 / sizeof(Word);
  typename Vector::Type rows[kSize], mixed[kSize];
  for (int i = 0; i < kSize; ++i) std::memcpy(&rows[i], source + i * source_stride, 16);
  for (int bits = kSize; bits > 1; bits /= 2) {
    for (int i = 0; i < kSize / 2; ++i) {
      mixed[2 * i] = Vector::low(rows[i], rows[i + kSize / 2]);
      mixed[2 * i + 1] = Vector::high(rows[i], rows[i + kSize / 2]);
    }
    for (int i = 0; i < kSize; ++i) rows[i] = mixed[i];
  }
  for (int i = 0; i < kSize; ++i) std::memcpy(target + i * target_stride, &rows[i], 16);
}

template <class Word>
void transpose_columns(const TransposeParams& p, int64_t col_begin, int64_t col_end) {
  constexpr int64_t kBlock = kLine / sizeof(Word), kSquare = 16 / sizeof(Word);
  const auto* const matrix = static_cast<const Word*>(p.matrix);
  auto* const out = static_cast<Word*>(p.out);
  Word before[kBlock][kBlock], after[kBlock][kBlock];
  for (int64_t row = 0; row < p.num_rows; row += kBlock) {
    const int64_t rows = std::min(kBlock, p.num_rows - row);
    for (int64_t col = col_begin; col < col_end; col += kBlock) {
      const int64_t cols = std::min(kBlock, col_end - col);
      const Word* const source = matrix + row * p.stride + col;
      Word* const target = out + col * p.num_rows + row;
      if (rows == kBlock && cols == kBlock) {
        for (int64_t i = 0; i < kBlock; ++i) std::memcpy(before[i], source + i * p.stride, kLine);
        for (int64_t j = 0; j < kBlock; j += kSquare) {
          for (int64_t i = 0; i < kBlock; i += kSquare) {
            transpose_square(before[i] + j, kBlock, after[j] + i, kBlock);
          }
        }
        for (int64_t j = 0; j < kBlock; ++j) std::memcpy(target + j * p.num_rows, after[j], kLine);
        continue;
      }
      for (int64_t j = 0; j < cols; ++j) {
        for (int64_t i = 0; i < rows; ++i) target[j * p.num_rows + i] = source[i * p.stride + j];
      }
    }
  }
}

}  // namespace

void run(const TransposeParams& p, const Parallel& parallel) {
  constexpr int64_t kBytesPerPiece = 128 * 1024;
  const int64_t block = kLine / p.element_size;
  const int64_t blocks = ceil_div(p.num_cols, block);
  cpu::for_ranges(parallel, blocks, ceil_div(kBytesPerPiece, p.num_rows * kLine), [&](int64_t begin, int64_t end) {
    const int64_t col_end = std::min(end * block, p.num_cols);
    if (p.element_size == 2) {
      transpose_columns<uint16_t>(p, begin * block, col_end);
    } else {
      transpose_columns<uint32_t>(p, begin * block, col_end);
    }
  });
}

}  // namespace moekernels
