// moekernels._C: what this build is, and the switches of its kernels. Imports without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "build_info.h"
#include "cuda/common/architectures.h"
#include "cuda/weight_grad/weight_grad_config.h"
#include "moekernels/cpu.h"
#include "moekernels/memory.h"
#include "python/plain_experts.h"

namespace py = pybind11;
using namespace moekernels;

namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(best_cpu_isa()); ++i) names.emplace_back(name_of(static_cast<CpuIsa>(i)));
  return names;
}

py::dict describe_build() {
  py::dict info;
  info["version"] = build_info::kVersion;
  info["git_revision"] = build_info::kGitRevision;
  info["cxx_compiler"] = build_info::kCxxCompiler;
  info["cuda_compiler"] = build_info::kCudaCompiler;
  info["cuda_archs"] = words(build_info::kCudaArchs);
  info["cuda_reason"] = build_info::kCudaReason;
  info["cpu_isas"] = available_isas();
  info["cpu_isa"] = name_of(current_cpu_isa());
  info["python_built"] = build_info::kPythonVersion;
  info["torch_built"] = build_info::kTorchVersion;
  info["torch_minimum"] = build_info::kTorchMinimum;
  return info;
}

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best_cpu_isa()); ++i) {
    if (name == name_of(static_cast<CpuIsa>(i))) return set_cpu_isa(static_cast<CpuIsa>(i));
  }
  std::string known;
  for (const std::string& isa : available_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw py::value_error("CPU instruction set must be one of " + known + " on this machine; got '" + name + "'");
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error("dtype must be float32, bfloat16 or float16; got '" + name + "'");
}

// What the CUDA grouped GEMM would run for a problem: the choice is a pure function, so no GPU is needed to ask.
std::string describe_tiles(int64_t num_rows, int64_t out_features, int64_t in_features, int32_t num_experts,
                           const std::string& dtype, bool gated, bool gathered, bool transposed, bool batch_invariant,
                           int compute_capability, int sm_count) {
  GemmProblem problem{};
  problem.num_rows = num_rows;
  problem.out_features = out_features;
  problem.in_features = in_features;
  problem.num_experts = num_experts;
  problem.dtype = dtype_of(dtype);
  problem.gated = gated;
  problem.gathered = gathered;
  const auto whole_vectors = [&](int64_t columns) { return columns * size_of(problem.dtype) % 16 == 0; };
  problem.aligned = whole_vectors(in_features) && (!transposed || whole_vectors(out_features));
  problem.transposed = transposed;
  problem.batch_invariant = batch_invariant;
  problem.compute_capability = compute_capability;
  problem.sm_count = sm_count;
  return to_string(choose_tile_config(problem));
}

// The same for the gradient of the weights.
std::string describe_weight_grad_tiles(int64_t num_rows, int64_t out_features, int64_t in_features, int32_t num_experts,
                                       const std::string& dtype, int compute_capability, int sm_count) {
  WeightGradProblem problem{};
  problem.num_rows = num_rows;
  problem.out_features = out_features;
  problem.in_features = in_features;
  problem.num_experts = num_experts;
  problem.dtype = dtype_of(dtype);
  problem.aligned = in_features * size_of(problem.dtype) % 16 == 0 && out_features * size_of(problem.dtype) % 16 == 0;
  problem.compute_capability = compute_capability;
  problem.sm_count = sm_count;
  return to_string(choose_weight_grad_config(problem));
}

py::dict describe_memory() {
  const BlockUsage usage = block_usage();
  py::dict bytes;
  bytes["in_use"] = usage.in_use;
  bytes["kept"] = usage.kept;
  bytes["most_in_use"] = usage.most_in_use;
  return bytes;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and kernel switches of moekernels.";
  m.def("build_info", &describe_build, "Version, compilers, instruction sets and CUDA architectures of this build.");
  m.def("set_cpu_isa", &set_isa, py::arg("name"), "Use the CPU kernels of this instruction set from now on.");
  m.def("memory_usage", &describe_memory, "Bytes of the large blocks that outputs on the CPU lie in.");
  m.def("release_memory", &release_kept_blocks, "Returns the blocks that no tensor uses to the system.");
  m.def("cuda_code_for", &code_for_device, py::arg("archs"), py::arg("compute_capability"),
        "What of a build for these architectures, \"80-real 89 90a\", runs on a GPU: \"sm_80\", \"PTX of sm_89\" or "
        "nothing.");
  m.def("describe_tiles", &describe_tiles, py::kw_only(), py::arg("num_rows"), py::arg("out_features"),
        py::arg("in_features"), py::arg("num_experts"), py::arg("dtype") = "bfloat16", py::arg("gated") = false,
        py::arg("gathered") = false, py::arg("transposed") = false, py::arg("batch_invariant") = false,
        py::arg("compute_capability") = 90, py::arg("sm_count") = 132,
        "The path and tiles that the CUDA grouped GEMM chooses for a problem.");
  m.def("describe_weight_grad_tiles", &describe_weight_grad_tiles, py::kw_only(), py::arg("num_rows"),
        py::arg("out_features"), py::arg("in_features"), py::arg("num_experts"), py::arg("dtype") = "bfloat16",
        py::arg("compute_capability") = 90, py::arg("sm_count") = 132,
        "The path and tiles that the CUDA weight gradient chooses for a problem.");
  m.def(
      "plain_experts",
      [](const py::list& experts, py::object expert_class, py::object linear_class, py::tuple tensor_classes,
         py::tuple dtypes, py::tuple up, py::str down, py::tuple others, py::tuple settings) {
        return plain_experts(experts, {expert_class, linear_class, tensor_classes, dtypes, up, down, others, settings});
      },
      py::arg("experts"), py::arg("expert_class"), py::arg("linear_class"), py::arg("tensor_classes"),
      py::arg("dtypes"), py::arg("up"), py::arg("down"), py::arg("others"), py::arg("settings"),
      "Weights and biases of experts whose modules do only what their classes say; None if one does not.");
}
