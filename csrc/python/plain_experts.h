// Whether a layer's experts may be passed by, and the weights that the kernels then run on.
#pragma once
#include <pybind11/pybind11.h>

namespace moekernels {

// How one expert holds its parts, and of which exact classes they must be.
struct ExpertLayout {
  pybind11::object expert_class;
  pybind11::object linear_class;
  pybind11::tuple tensor_classes;  // what a weight or bias may be
  pybind11::tuple dtypes;          // those of a kernel
  pybind11::tuple up;              // the names of the Linears whose rows follow one another
  pybind11::str down;              // the name of the other one
  pybind11::tuple others;          // further modules that would be called
  pybind11::tuple settings;        // attributes of those that must be the same in all experts
};

// (up weights, down weights, up biases or None, down biases or None), experts slowest; None if a module is not of its
// class, has hooks or a forward of its own or lacks a part, or if the weights are not plain tensors of one device and
// dtype and, for each projection, one shape. Asked in every forward pass.
pybind11::object plain_experts(const pybind11::list& experts, const ExpertLayout& layout);

}  // namespace moekernels
