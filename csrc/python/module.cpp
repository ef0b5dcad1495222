// moekernels._C: what this build is, and the switches of its kernels. Imports without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "build_info.h"
#include "moekernels/cpu.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and kernel switches of moekernels.";
  m.def("build_info", &describe_build, "Version, compilers, instruction sets and CUDA architectures of this build.");
  m.def("set_cpu_isa", &set_isa, py::arg("name"), "Use the CPU kernels of this instruction set from now on.");
}
