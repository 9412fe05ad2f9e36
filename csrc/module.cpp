// scm_kernels._C: the kernels as Python functions of plain addresses, sizes and strides. The GIL is
// released while they run; a kernel's error code becomes an exception.

#include <new>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using scm::Address;
using scm::Rows;
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
                       uintptr_t lse, uintptr_t mu) {
  auto p = scm::attention<scm::AttentionForward>(sizes, causal, scale, inputs);
  p.threads = threads;
  p.out = scm::tensor(out), p.t_out = scm::tensor(t_out);
  p.lse = reinterpret_cast<float*>(lse), p.mu = reinterpret_cast<float*>(mu);
  run(scm::kernels().attention_forward, p);
}

void attention_backward(const Sizes& sizes, bool causal, float scale, int threads,
                        const std::vector<Address>& inputs, const std::vector<Address>& saved,
                        uintptr_t lse, uintptr_t mu, const std::vector<Address>& gradients) {
  auto p = scm::attention<scm::AttentionBackward>(sizes, causal, scale, inputs);
  p.threads = threads;
  scm::Tensor* from[] = {&p.out, &p.t_out, &p.dout, &p.dt_out};
  for (size_t i = 0; i < std::size(from); ++i) *from[i] = scm::tensor(saved.at(i));
  p.lse = reinterpret_cast<const float*>(lse), p.mu = reinterpret_cast<const float*>(mu);
  scm::Tensor* to[] = {&p.dq, &p.dk, &p.dv, &p.dtq, &p.dtk, &p.dtv, &p.dmask, &p.dtmask};
  for (size_t i = 0; i < std::size(to); ++i) *to[i] = scm::tensor(gradients.at(i));
  run(scm::kernels().attention_backward, p);
}

void tangent_norm(int64_t b, int64_t d, int threads, int type, const Rows& inputs,
                  uintptr_t coefficients, uintptr_t squares) {
  auto p = scm::tangent<scm::TangentNorm>(b, d, type, inputs, coefficients);
  p.threads = threads;
  p.squares = reinterpret_cast<double*>(squares);
  run(scm::kernels().tangent_norm, p);
}

void tangent_apply(int64_t b, int64_t d, int threads, int type, const Rows& inputs,
                   uintptr_t coefficients, uintptr_t out) {
  auto p = scm::tangent<scm::TangentApply>(b, d, type, inputs, coefficients);
  p.threads = threads;
  p.out = reinterpret_cast<char*>(out);
  run(scm::kernels().tangent_apply, p);
}

void tangent_normalize(int64_t b, int64_t d, int threads, int type, const Rows& inputs,
                       uintptr_t coefficients, uintptr_t out, double count, double c, bool zero) {
  auto p = scm::tangent<scm::TangentNormalize>(b, d, type, inputs, coefficients);
  p.threads = threads;
  p.out = reinterpret_cast<char*>(out), p.count = count, p.c = c, p.zero = zero;
  run(scm::kernels().tangent_normalize, p);
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
  m.def("tangent_norm", &tangent_norm);
  m.def("tangent_apply", &tangent_apply);
  m.def("tangent_normalize", &tangent_normalize);
#ifdef SCM_CUDA
  scm::add_cuda_functions(m);
#endif
}
