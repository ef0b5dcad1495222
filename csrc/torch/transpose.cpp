#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

// matrix [M, N] -> [N, M], contiguous
Tensor transpose(const Tensor& matrix) {
  const Checks check("transpose", "matrix", matrix);
  check.rank("matrix", matrix, 2, "[num_rows, num_cols]");
  TransposeParams params{};
  params.element_size = size_of(check.floating("matrix", matrix));
  params.num_rows = matrix.size(0);
  params.num_cols = matrix.size(1);
  Tensor out = new_empty(matrix, {params.num_cols, params.num_rows});
  if (out.numel() == 0) return out;

  const Tensor rows = dense_rows(matrix);
  params.matrix = rows.data_ptr();
  params.out = out.mutable_data_ptr();
  params.stride = rows.stride(0);
  launch(params, matrix);
  return out;
}

}  // namespace moekernels
