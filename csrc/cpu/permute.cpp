// hidden [T, H], token_of_row [N] -> rows [N, H]
#include <cstring>

#include "common/rounding.h"
#include "cpu/parallel.h"

namespace moekernels {

void run(const PermuteParams& p, const Parallel& parallel) {
  constexpr int64_t kBytesPerPiece = 128 * 1024;
  const int64_t element = size_of(p.dtype);
  const int64_t row_bytes = p.hidden_size * element;
  if (row_bytes == 0) return;
  const auto* hidden = static_cast<const char*>(p.hidden);
  auto* rows = static_cast<char*>(p.rows);
  cpu::for_ranges(parallel, p.num_rows, ceil_div(kBytesPerPiece, row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = p.token_of_row[row];
      char* target = rows + row * row_bytes;
      if (token >= 0 && token < p.num_tokens) {
        std::memcpy(target, hidden + token * p.hidden_stride * element, static_cast<size_t>(row_bytes));
      } else {
        std::memset(target, 0, static_cast<size_t>(row_bytes));
      }
    }
  });
}

}  // namespace moekernels
