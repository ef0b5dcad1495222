// rows [N, H], row_of_slot [T, K], weights [T, K] -> out [T, H], and backwards
#include "common/rounding.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace moekernels {
namespace {

constexpr int64_t kBytesPerPiece = 128 * 1024;

}  // namespace

void run(const UnpermuteParams& p, const Parallel& parallel) {
  if (p.hidden_size == 0) return;
  const int64_t token_bytes = p.hidden_size * size_of(p.dtype) * (p.top_k + 1);
  const auto kernel = cpu::kernels().unpermute;
  cpu::for_ranges(parallel, p.num_tokens, ceil_div(kBytesPerPiece, token_bytes),
                  [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void run(const UnpermuteGradParams& p, const Parallel& parallel) {
  const int64_t row_bytes = (p.hidden_size > 0 ? p.hidden_size : 1) * size_of(p.dtype);
  const auto& kernels = cpu::kernels();
  if (p.grad_rows != nullptr) {
    cpu::for_ranges(parallel, p.num_rows, ceil_div(kBytesPerPiece, 2 * row_bytes),
                    [&](int64_t begin, int64_t end) { kernels.unpermute_grad_rows(p, begin, end); });
  }
  if (p.grad_weights != nullptr) {
    cpu::for_ranges(parallel, p.num_tokens, ceil_div(kBytesPerPiece, row_bytes * (p.top_k + 1)),
                    [&](int64_t begin, int64_t end) { kernels.unpermute_grad_weights(p, begin, end); });
  }
}

}  // namespace moekernels
