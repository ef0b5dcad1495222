// What an op demands of its arguments. Every check names the op and the tensor, what it must be, and what it was.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "moekernels/params.h"

namespace moekernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checks the arguments of one op, on the device and in the dtype of its first tensor.
class Checks {
 public:
  Checks(const char* op, const char* name, const Tensor& first) : op_(op), first_name_(name), first_(first) {}

  // Throws "moekernels::<op>: <message>" unless `condition` holds. The parts are made in any case: those that cost more
  // than a number are for after the condition.
  template <typename... Parts>
  void that(bool condition, const Parts&... parts) const {
    if (condition) return;
    std::ostringstream message;
    message << "moekernels::" << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // `shape` is how the documentation writes it, with as many letters as dimensions: "[num_tokens, hidden_size]".
  void rank(const char* name, const Tensor& tensor, int64_t rank, const char* shape) const {
    that(tensor.dim() == rank, name, " must have ", rank, " dimensions ", shape, ", got ", tensor.dim());
  }

  void shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* shape) const;

  // float32, bfloat16 or float16.
  DType floating(const char* name, const Tensor& tensor) const;
  void dtype(const char* name, const Tensor& tensor, ScalarType expected) const;
  void same_dtype(const char* name, const Tensor& tensor) const;
  void same_device(const char* name, const Tensor& tensor) const;
  bool is_like_first(const Tensor& tensor) const;  // in dtype and device

  // An int32 tensor of one dimension on the same device.
  void index(const char* name, const Tensor& tensor, int64_t rank, const char* shape) const;

  // A float32 tensor of these sizes on the same device.
  void float_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                   const char* shape) const;

  // expert_offsets [E + 1]: int32; on the CPU also that it rises from 0 to at most `num_rows`.
  void expert_offsets(const Tensor& tensor, int64_t num_experts, int64_t num_rows) const;

  // Sets the activation of parameters by its name, or as "swiglu(alpha,limit,shift,interleaved)".
  template <typename Params>
  void set_activation(Params& params, const std::string& name, bool gated) const {
    params.activation = activation(name, gated, params.swiglu);
    params.gated = gated;
  }
  Activation activation(const std::string& name, bool gated, Swiglu& swiglu) const;
  Scoring scoring(const std::string& name) const;
  Score score(const std::string& name) const;

  // float32 where none is given.
  DType probs_dtype(const std::optional<ScalarType>& dtype, Scoring scoring) const;

 private:
  const char* op_;
  const char* first_name_;
  const Tensor& first_;
};

std::string to_string(ScalarType dtype);

// The tensor itself if its last dimension is dense, else a contiguous copy.
Tensor dense_rows(const Tensor& tensor);
std::optional<Tensor> dense_rows(const std::optional<Tensor>& tensor);
Tensor dense(const Tensor& tensor);
std::optional<Tensor> dense(const std::optional<Tensor>& tensor);

}  // namespace moekernels
