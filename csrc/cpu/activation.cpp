// linear [N, 2F] or [N, F] -> out [N, F], and backwards
#include "common/rounding.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace moekernels {
namespace {

constexpr int64_t kBytesPerPiece = 64 * 1024;

// Rows that make a piece, of `widths` times F elements each.
int64_t rows_per_piece(int64_t width, DType dtype, int64_t widths) {
  const int64_t row_bytes = width * size_of(dtype) * widths;
  return ceil_div(kBytesPerPiece, row_bytes > 0 ? row_bytes : 1);
}

}  // namespace

void run(const ActivationParams& p, const Parallel& parallel) {
  const auto kernel = cpu::kernels().activation;
  cpu::for_ranges(parallel, p.num_rows, rows_per_piece(p.width, p.dtype, p.gated ? 3 : 2),
                  [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void run(const ActivationGradParams& p, const Parallel& parallel) {
  const auto kernel = cpu::kernels().activation_grad;
  cpu::for_ranges(parallel, p.num_rows, rows_per_piece(p.width, p.dtype, p.gated ? 6 : 4),
                  [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace moekernels
