#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {
namespace {

// The strides of all dimensions but the last; 0 where a size of 1 is broadcast.
void set_strides(int64_t (&strides)[3], const Tensor& tensor, bool broadcasts) {
  for (int64_t i = 0; i < 3; ++i) strides[i] = broadcasts && tensor.size(i) == 1 ? 0 : tensor.stride(i);
}

}  // namespace

// query [B, H, Q, D], key and value [B', G, S, D], bias broadcastable to [B, H, Q, S] -> [B, Q, H * D]
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                 const std::optional<Tensor>& bias) {
  const Checks check("attention", "query", query);
  check.rank("query", query, 4, "[batch, heads, queries, head_dim]");
  check.rank("key", key, 4, "[key_batch, key_heads, keys, head_dim]");
  AttentionParams params{};
  params.dtype = check.floating("query", query);
  params.batch_size = query.size(0);
  params.num_heads = query.size(1);
  params.num_queries = query.size(2);
  params.head_dim = query.size(3);
  params.key_batch_size = key.size(0);
  params.num_key_heads = key.size(1);
  params.num_keys = key.size(2);
  params.scale = static_cast<float>(scale);
  check.shape("key", key, {params.key_batch_size, params.num_key_heads, params.num_keys, params.head_dim},
              "[key_batch, key_heads, keys, head_dim]");
  check.shape("value", value, {params.key_batch_size, params.num_key_heads, params.num_keys, params.head_dim},
              "[key_batch, key_heads, keys, head_dim]");
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"key", key}, {"value", value}}) {
    check.same_dtype(name, tensor);
    check.same_device(name, tensor);
  }
  const auto divides = [](int64_t part, int64_t whole) { return part > 0 ? whole % part == 0 : whole == 0; };
  check.that(divides(params.key_batch_size, params.batch_size), "the batch of key must divide that of query, ",
             params.batch_size, ", got ", params.key_batch_size);
  check.that(divides(params.num_key_heads, params.num_heads), "the heads of key must divide those of query, ",
             params.num_heads, ", got ", params.num_key_heads);
  if (bias.has_value()) {
    check.rank("bias", *bias, 4, "[batch, heads, queries, keys]");
    check.same_dtype("bias", *bias);
    check.same_device("bias", *bias);
    params.bias_batch_size = bias->size(0);
    const auto is_one_of = [&](int64_t i, int64_t full) { return bias->size(i) == 1 || bias->size(i) == full; };
    check.that((is_one_of(0, params.batch_size) || bias->size(0) == params.key_batch_size) &&
                   is_one_of(1, params.num_heads) && is_one_of(2, params.num_queries) &&
                   bias->size(3) == params.num_keys,
               "bias must be [", params.batch_size, ", ", params.num_heads, ", ", params.num_queries, ", ",
               params.num_keys, "] or broadcast to it (but for the keys), got [", bias->size(0), ", ", bias->size(1),
               ", ", bias->size(2), ", ", bias->size(3), "]");
  }
  Tensor out = new_empty(query, {params.batch_size, params.num_queries, params.num_heads * params.head_dim});
  if (out.numel() == 0) return out;

  const Tensor dense_query = dense_rows(query);
  const Tensor dense_key = dense_rows(key);
  const Tensor dense_value = dense_rows(value);
  const std::optional<Tensor> dense_bias = dense_rows(bias);
  params.query = dense_query.data_ptr();
  params.key = dense_key.data_ptr();
  params.value = dense_value.data_ptr();
  params.bias = dense_bias ? dense_bias->data_ptr() : nullptr;
  params.out = out.mutable_data_ptr();
  set_strides(params.query_strides, dense_query, false);
  set_strides(params.key_strides, dense_key, false);
  set_strides(params.value_strides, dense_value, false);
  if (dense_bias) set_strides(params.bias_strides, *dense_bias, true);
  launch(params, query);
  return out;
}

}  // namespace moekernels
