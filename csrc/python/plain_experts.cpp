// Several hundred modules lie all over memory, and since the last call the weights of a layer have passed through the
// caches. So the modules are not asked one after the other: every step is taken for all of them, and fetches for all
// what the next one reads.
#include "plain_experts.h"

#include <array>
#include <vector>

namespace py = pybind11;

namespace moekernels {
namespace {

constexpr int kHookKinds = 4;

// Strings that are looked up in the dictionaries of modules.
struct Names {
  std::array<py::str, kHookKinds> hooks{interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                        interned("_backward_hooks"), interned("_backward_pre_hooks")};
  py::str forward = interned("forward");
  py::str modules = interned("_modules");
  py::str parameters = interned("_parameters");
  py::str weight = interned("weight");
  py::str bias = interned("bias");
  py::str dtype = interned("dtype");
  py::str device = interned("device");
  py::str shape = interned("shape");
  py::str is_meta = interned("is_meta");

  static py::str interned(const char* text) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text)); }
};

const Names& names() {
  static const Names* const all = new Names();  // outlives the interpreter
  return *all;
}

void fetch(const void* address) {
  __builtin_prefetch(address);
}

// What a look-up in this dictionary reads, which must have been fetched itself.
void fetch_contents(PyObject* dict) {
  const auto* fields = reinterpret_cast<const PyDictObject*>(dict);
  fetch(fields->ma_keys);
  fetch(reinterpret_cast<const char*>(fields->ma_keys) + 64);
  const char* values = reinterpret_cast<const char*>(fields->ma_values);
  if (!values) return;
  fetch(values);
  fetch(values + 64);
  fetch(values + 128);
}

PyObject* item(PyObject* dict, py::handle key) {
  PyObject* found = PyDict_GetItemWithError(dict, key.ptr());
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

py::object attribute(PyObject* object, const py::str& name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name.ptr()));
  if (!found) throw py::error_already_set();
  return found;
}

bool is_equal(PyObject* a, PyObject* b) {
  const int equal = a == b ? 1 : PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal == 1;
}

bool is_exactly(PyObject* object, py::handle cls) {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == cls.ptr();
}

// Whether what an instance has as `forward` is its class's own, as hooks that were removed leave it.
bool is_own_forward(PyObject* forward, PyObject* module) {
  return PyMethod_Check(forward) && PyMethod_GET_SELF(forward) == module &&
         attribute(reinterpret_cast<PyObject*>(Py_TYPE(module)), names().forward).ptr() ==
             PyMethod_GET_FUNCTION(forward);
}

struct Module {
  PyObject* self;
  py::object dict = {};
  std::array<PyObject*, kHookKinds> hooks = {};
  PyObject* parts = nullptr;  // its `_modules` or `_parameters`
};

// Whether these modules do only what their classes say, and have this dictionary of parts (or none is asked for).
bool are_plain(std::vector<Module>& modules, const py::str* parts) {
  for (Module& module : modules) {
    module.dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.self, nullptr));
    if (!module.dict) throw py::error_already_set();
    fetch(module.dict.ptr());
  }
  for (Module& module : modules) fetch_contents(module.dict.ptr());
  for (Module& module : modules) {
    PyObject* const dict = module.dict.ptr();
    PyObject* const forward = item(dict, names().forward);
    if (forward && !is_own_forward(forward, module.self)) return false;
    for (int kind = 0; kind < kHookKinds; ++kind) {
      module.hooks[kind] = item(dict, names().hooks[kind]);
      if (!module.hooks[kind]) return false;
      fetch(module.hooks[kind]);
    }
    if (!parts) continue;
    module.parts = item(dict, *parts);
    if (!module.parts) return false;
    fetch(module.parts);
  }
  for (Module& module : modules) {
    for (PyObject* hooks : module.hooks) {
      if (!PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) return false;
    }
    if (!parts) continue;
    if (!PyDict_Check(module.parts)) return false;
    fetch_contents(module.parts);
  }
  return true;
}

// Adds to every list the child of that name of every expert, and fetches it.
bool add_children(const std::vector<Module>& experts, py::handle name, std::vector<Module>& children) {
  for (const Module& expert : experts) {
    PyObject* const child = item(expert.parts, name);
    if (!child) return false;
    fetch(child);
    children.push_back({child});
  }
  return true;
}

bool are_exactly(const std::vector<Module>& modules, py::handle cls) {
  for (const Module& module : modules) {
    if (!is_exactly(module.self, cls)) return false;
  }
  return true;
}

class Tensors {
 public:
  explicit Tensors(const py::tuple& classes) : classes_(classes) {}

  // The weight and bias that a call of these Linears finds: registered ones, or what FSDP1 puts in their place.
  bool find(const std::vector<Module>& linears) {
    for (const Module& linear : linears) {
      for (auto& [name, found] : {std::pair(&names().weight, &weights_), std::pair(&names().bias, &biases_)}) {
        PyObject* tensor = item(linear.parts, *name);
        if (!tensor) tensor = item(linear.dict.ptr(), *name);
        if (!tensor) return false;
        fetch(tensor);
        found->push_back(tensor);
      }
    }
    return true;
  }

  bool are_plain() const {
    for (PyObject* weight : weights_) {
      if (!is_plain(weight)) return false;
    }
    for (PyObject* bias : biases_) {
      if ((bias == Py_None) != (biases_.front() == Py_None) || (bias != Py_None && !is_plain(bias))) return false;
    }
    return true;
  }

  PyObject* first_weight() const { return weights_.front(); }

  // Whether the weights are like this one in dtype and device, and like each other in shape.
  bool are_like(PyObject* first) const {
    const py::object dtype = attribute(first, names().dtype), device = attribute(first, names().device);
    const py::object shape = attribute(first_weight(), names().shape);
    for (PyObject* weight : weights_) {
      if (!attribute(weight, names().dtype).is(dtype)) return false;
      if (!is_equal(attribute(weight, names().device).ptr(), device.ptr())) return false;
      if (!is_equal(attribute(weight, names().shape).ptr(), shape.ptr())) return false;
    }
    return true;
  }

  // Of `parts` Linears in each of `num_experts` experts, found part by part: the experts slowest.
  py::object weights(size_t num_experts) const { return in_order(weights_, num_experts); }
  py::object biases(size_t num_experts) const {
    return biases_.front() == Py_None ? py::object(py::none()) : in_order(biases_, num_experts);
  }

 private:
  bool is_plain(PyObject* tensor) const {
    for (const py::handle cls : classes_) {
      if (is_exactly(tensor, cls)) return true;
    }
    return false;
  }

  static py::object in_order(const std::vector<PyObject*>& tensors, size_t num_experts) {
    const size_t parts = tensors.size() / num_experts;
    py::list result(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      PyObject* const tensor = tensors[i % parts * num_experts + i / parts];
      Py_INCREF(tensor);
      PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), tensor);
    }
    return result;
  }

  const py::tuple& classes_;
  std::vector<PyObject*> weights_, biases_;
};

// Whether these modules of all experts are of one class and have the same settings.
bool are_alike(const std::vector<Module>& modules, const py::tuple& settings) {
  if (!are_exactly(modules, py::type::handle_of(modules.front().self))) return false;
  for (const py::handle name : settings) {
    PyObject* const first = item(modules.front().dict.ptr(), name);
    for (const Module& module : modules) {
      PyObject* const mine = item(module.dict.ptr(), name);
      if (mine != first && !(mine && first && is_equal(mine, first))) return false;
    }
  }
  return true;
}

}  // namespace

py::object plain_experts(const py::list& list, const ExpertLayout& layout) {
  const size_t num_experts = list.size();
  if (num_experts == 0) return py::none();
  std::vector<Module> experts;
  experts.reserve(num_experts);
  for (const py::handle expert : list) {
    fetch(expert.ptr());
    experts.push_back({expert.ptr()});
  }
  if (!are_exactly(experts, layout.expert_class) || !are_plain(experts, &names().modules)) return py::none();

  // The up-projections part by part, then the down-projections.
  std::vector<Module> linears;
  linears.reserve((layout.up.size() + 1) * num_experts);
  for (const py::handle name : layout.up) {
    if (!add_children(experts, name, linears)) return py::none();
  }
  if (!add_children(experts, layout.down, linears)) return py::none();
  if (!are_exactly(linears, layout.linear_class) || !are_plain(linears, &names().parameters)) return py::none();

  for (const py::handle name : layout.others) {
    std::vector<Module> others;
    others.reserve(num_experts);
    if (!add_children(experts, name, others) || !are_plain(others, nullptr) || !are_alike(others, layout.settings)) {
      return py::none();
    }
  }

  const auto first_down = linears.end() - static_cast<std::ptrdiff_t>(num_experts);
  Tensors up(layout.tensor_classes), down(layout.tensor_classes);
  if (!up.find({linears.begin(), first_down}) || !down.find({first_down, linears.end()})) return py::none();
  if (!up.are_plain() || !down.are_plain()) return py::none();
  PyObject* const first = up.first_weight();
  if (!layout.dtypes.contains(attribute(first, names().dtype)) ||
      attribute(first, names().is_meta).is(py::bool_(true))) {
    return py::none();
  }
  if (!up.are_like(first) || !down.are_like(first)) return py::none();
  return py::make_tuple(up.weights(num_experts), down.weights(num_experts), up.biases(num_experts),
                        down.biases(num_experts));
}

}  // namespace moekernels
