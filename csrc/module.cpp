// scm_kernels._C: the kernels as Python functions of plain addresses, sizes and strides. The GIL is
// released while they run; a kernel's error code becomes an exception.

#include <new>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using scm::Address;
using scm::Sizes;

namespace {

template <class Problem>
void run(scm::Status (*kernel)(const Problem&), const Problem& problem) {
  scm::Status status;
  {
    py::gil_scoped_release release;
    status = kernel(problem);
  }
  if (status == scm::kOutOfMemory) throw std::bad_alloc();
}

void attention_forward(const Sizes& sizes, bool causal, float scale, int threads,
                       const std::vector<Address>& inputs, const Address& out, const Address& t_out,
                       uintptr_t lse, uintptr_t mu, uintptr_t lse_low) {
  auto p = scm::attention<scm::AttentionForward>(sizes, causal, scale, inputs);
  p.threads = threads;
  p.out = scm::tensor(out), p.t_out = scm::tensor(t_out);
  p.lse = reinterpret_cast<float*>(lse), p.mu = reinterpret_cast<float*>(mu);
  p.lse_low = reinterpret_cast<float*>(lse_low);
  run(scm::kernels().attention_forward, p);
}

void attention_backward(const Sizes& sizes, bool causal, float scale, int threads,
                        const std::vector<Address>& inputs, const std::vector<Address>& saved,
                        uintptr_t lse, uintptr_t mu, uintptr_t lse_low,
                        const std::vector<Address>& gradients) {
  auto p = scm::attention<scm::AttentionBackward>(sizes, causal, scale, inputs);
  p.threads = threads;
  scm::Tensor* from[] = {&p.out, &p.t_out, &p.dout, &p.dt_out};
  for (size_t i = 0; i < std::size(from); ++i) *from[i] = scm::tensor(saved.at(i));
  p.lse = reinterpret_cast<const float*>(lse), p.mu = reinterpret_cast<const float*>(mu);
  p.lse_low = reinterpret_cast<const float*>(lse_low);
  scm::Tensor* to[] = {&p.dq, &p.dk, &p.dv, &p.dtq, &p.dtk, &p.dtv, &p.dmask, &p.dtmask};
  for (size_t i = 0; i < std::size(to); ++i) *to[i] = scm::tensor(gradients.at(i));
  run(scm::kernels().attention_backward, p);
}

// kernel(make(arguments)) as a function of the number of threads and these arguments.
template <class Problem, class... Arguments>
auto function(scm::Status (*kernel)(const Problem&), Problem (*make)(Arguments...)) {
  return [kernel, make](int threads, Arguments... arguments) {
    Problem p = make(arguments...);
    p.threads = threads;
    run(kernel, p);
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
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("tangent_loss", function(scm::tangent_loss, scm::loss));
  m.def("tangent_apply", function(scm::tangent_apply, scm::apply));
  m.def("tangent_gradient", function(scm::tangent_gradient, scm::gradient));
  m.def("tangent_normalize", function(scm::tangent_normalize, scm::normalize));
#ifdef SCM_CUDA
  scm::add_cuda_functions(m);
#endif
}
