// rows [N, H], row_of_slot [T, K], weights [T, K] -> out [T, H]
#include "kernel_table.h"
#include "parallel.h"

namespace moekernels {

void unpermute_cpu(const UnpermuteParams& p, const Parallel& parallel) {
  constexpr int64_t kBytesPerPiece = 128 * 1024;
  if (p.hidden_size == 0) return;
  const int64_t token_bytes = p.hidden_size * size_of(p.dtype) * (p.top_k + 1);
  const auto run = cpu::kernels().unpermute;
  cpu::for_ranges(parallel, p.num_tokens, cpu::ceil_div(kBytesPerPiece, token_bytes),
                  [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace moekernels
