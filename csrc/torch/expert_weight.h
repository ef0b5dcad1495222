// The weights of experts as an op is given them: one stack, or a table of matrices that lie anywhere.
#pragma once

#include <string>
#include <vector>

#include "checks.h"

namespace moekernels {

// One stack [E, M, K], or E * P matrices [M / P, K] of equal shape, expert slowest, the rows of an expert's P parts
// following one another. Checked against the first tensor of the op; `shape` is that of the stack in messages.
class ExpertWeight {
 public:
  ExpertWeight(const Checks& check, const char* name, const std::vector<Tensor>& tensors, int64_t num_experts,
               const char* shape);

  int64_t num_experts() const { return num_experts_; }
  int64_t num_parts() const { return num_parts_; }  // P; 1 of a stack
  int64_t rows() const { return rows_; }            // M
  int64_t columns() const { return columns_; }      // K
  const char* name() const { return name_; }

  // Gate and value of a column lie in parts of equal size.
  void check_gated(const Checks& check) const;

  // Fills in where the weights are, for as long as this object lives. Matrices whose rows are not dense are copied.
  void set(GroupedGemmParams& params);

 private:
  const char* name_;
  const std::vector<Tensor>& tensors_;
  bool is_stack_;
  int64_t num_experts_, num_parts_, rows_, columns_;
  std::vector<Tensor> copies_;
  std::vector<WeightPart> parts_;
};

// Their biases: none, one stack [E, M], or as many vectors as there are matrices. Of a transposed weight [E, K, M] they
// are one stack.
class ExpertBias {
 public:
  ExpertBias(const Checks& check, const char* name, const std::vector<Tensor>& tensors, const ExpertWeight& weight,
             bool transposed = false);
  bool is_none() const { return tensors_.empty(); }
  void set(GroupedGemmParams& params);

 private:
  const std::vector<Tensor>& tensors_;
  std::vector<Tensor> copies_;
  std::vector<const void*> parts_;
};

}  // namespace moekernels
