#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

// `row_of_slot` only helps the gradient along.
Tensor permute(const Tensor& hidden, const Tensor& token_of_row, const std::optional<Tensor>& row_of_slot) {
  const Checks check("permute", "hidden", hidden);
  check.rank("hidden", hidden, 2, "[num_tokens, hidden_size]");
  check.index("token_of_row", token_of_row, 1, "[num_rows]");
  if (row_of_slot.has_value()) {
    check.index("row_of_slot", *row_of_slot, 2, "[num_tokens, top_k]");
    check.that(row_of_slot->size(0) == hidden.size(0), "row_of_slot must have one row per token, ", hidden.size(0),
               ", got ", row_of_slot->size(0));
  }

  PermuteParams params{};
  params.dtype = check.floating("hidden", hidden);
  params.num_tokens = hidden.size(0);
  params.num_rows = token_of_row.size(0);
  params.hidden_size = hidden.size(1);
  Tensor rows = new_empty(hidden, {params.num_rows, params.hidden_size});
  if (rows.numel() == 0) return rows;

  const Tensor hidden_rows = dense_rows(hidden);
  const Tensor dense_tokens = dense(token_of_row);
  params.hidden = hidden_rows.data_ptr();
  params.token_of_row = dense_tokens.const_data_ptr<int32_t>();
  params.rows = rows.mutable_data_ptr();
  params.hidden_stride = hidden_rows.stride(0);
  launch(params, hidden);
  return rows;
}

}  // namespace moekernels
