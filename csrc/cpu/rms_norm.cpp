// input [N, H], weight [H] -> out [N, H]
#include "common/rounding.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace moekernels {

void run(const RmsNormParams& p, const Parallel& parallel) {
  constexpr int64_t kBytesPerPiece = 64 * 1024;
  const int64_t row_bytes = p.hidden_size * size_of(p.dtype) * 2;
  if (row_bytes == 0) return;
  const auto kernel = cpu::kernels().rms_norm;
  cpu::for_ranges(parallel, p.num_rows, ceil_div(kBytesPerPiece, row_bytes),
                  [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace moekernels
