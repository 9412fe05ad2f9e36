// scm_kernels._C: the kernels as Python functions of plain addresses, sizes and strides. The GIL is
// released while they run; a kernel's error code becomes an exception.

#include <new>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

// kernel(make(arguments)) as a function of the number of threads and these arguments.
template <class Problem, class... Arguments>
auto function(scm::Status (*kernel)(const Problem&), Problem (*make)(Arguments...)) {
  return [kernel, make](int threads, Arguments... arguments) {
    Problem p = make(arguments...);
    p.threads = threads;
    scm::Status status;
    {
      py::gil_scoped_release release;
      status = kernel(p);
    }
    if (status == scm::kOutOfMemory) throw std::bad_alloc();
  };
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const scm::Kernels& kernels : scm::available_kernels()) names.push_back(kernels.isa);
  return names;
}

void select_instruction_set(const std::string& name) {
  if (scm::select_kernels(name.c_str())) return;
  std::string known;
  for (const std::string& other : instruction_sets()) known += (known.empty() ? "" : ", ") + other;
  throw py::value_error("instruction set: got '" + name + "', expected one of " + known);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of scm_kernels. Arguments are addresses: call them through the ops.";
  m.def("instruction_sets", &instruction_sets, "Those built and supported here, best first.");
  m.def("instruction_set", [] { return scm::kernels().isa; }, "The one in use.");
  m.def("select_instruction_set", &select_instruction_set, "Use this one from now on.");
  m.def("attention_forward", function(scm::attention_forward, scm::forward));
  m.def("attention_backward", function(scm::attention_backward, scm::backward));
  m.def("tangent_loss", function(scm::tangent_loss, scm::loss));
  m.def("tangent_apply", function(scm::tangent_apply, scm::apply));
  m.def("tangent_gradient", function(scm::tangent_gradient, scm::gradient));
  m.def("tangent_normalize", function(scm::tangent_normalize, scm::normalize));
#ifdef SCM_CUDA
  scm::add_cuda_functions(m);
#endif
}
