// The CUDA kernels as Python functions of plain addresses, sizes and strides: those of the CPU's
// without threads, with a device and a stream. Without a stream nothing is launched, and what would
// be is returned. An error becomes a RuntimeError.

#include "bindings.h"

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace py = pybind11;

namespace scm {
namespace {

// (kernel, blocks, threads, bytes of dynamic shared memory, bytes of its parameter)
using Launches = std::vector<std::tuple<std::string, int64_t, int, int, py::bytes>>;
using Stream = std::optional<uintptr_t>;

std::string text(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

// `host` puts the launches of an op into a queue.
template <class Host>
Launches run(const char* op, int device, Stream stream, Host host) {
  std::vector<cuda::Launch> list;
  cudaError_t error;
  {
    // A launch takes microseconds, but waits where the stream is full or its kernel is not loaded.
    py::gil_scoped_release release;
    cuda::Queue queue =
        stream ? cuda::Queue(device, reinterpret_cast<cudaStream_t>(*stream)) : cuda::Queue(&list);
    error = host(queue);
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + text(error));
  Launches launches;
  for (const cuda::Launch& x : list) {
    launches.emplace_back(x.name, x.blocks, x.threads, x.shared, py::bytes(x.params));
  }
  return launches;
}

// What launches calls of one kind: a function of the addresses of q, k, v, tq, tk, tv, out, t_out,
// lse, mu, 0 for one that is absent, of a device and a stream.
py::cpp_function attention_forward(const Sizes& sizes, bool causal, float scale,
                                   const std::vector<Address>& inputs, const Address& out,
                                   const Address& t_out) {
  const auto kind = forward(sizes, causal, scale, inputs, out, t_out, 0, 0, 0);
  return [kind](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t tq, uintptr_t tk, uintptr_t tv,
                uintptr_t out, uintptr_t t_out, uintptr_t lse, uintptr_t mu, int device,
                Stream stream) {
    AttentionForward p = kind;
    p.q.data = pointer<char>(q), p.k.data = pointer<char>(k), p.v.data = pointer<char>(v);
    p.tq.data = pointer<char>(tq), p.tk.data = pointer<char>(tk), p.tv.data = pointer<char>(tv);
    p.out.data = pointer<char>(out), p.t_out.data = pointer<char>(t_out);
    p.lse = pointer<float>(lse), p.mu = pointer<float>(mu);
    return run("attention_forward", device, stream,
               [&](cuda::Queue& queue) { return cuda::launch_attention_forward(p, queue); });
  };
}

std::optional<std::string> error(int device) {
  const cudaError_t error = cuda::usable(device);
  return error == cudaSuccess ? std::nullopt : std::make_optional(text(error));
}

// host(make(arguments)) as a function of these arguments, `sums`, a device and a stream.
template <class Problem, class... Arguments>
auto function(const char* op, cudaError_t (*host)(const Problem&, cuda::Queue&),
              Problem (*make)(Arguments...)) {
  return [op, host, make](Arguments... arguments, uintptr_t sums, int device, Stream stream) {
    Problem p = make(arguments...);
    p.sums = pointer<double>(sums);
    return run(op, device, stream, [&](cuda::Queue& queue) { return host(p, queue); });
  };
}

}  // namespace

void add_cuda_functions(py::module_& m) {
  m.def("cuda_error", &error, "Why a device does not run the kernels, None if it does.");
  m.def("cuda_attention_forward", &attention_forward, "A function that launches calls of a kind.");
  m.def("cuda_tangent_sums", &cuda::tangent_sums);
  m.def("cuda_tangent_loss", function("tangent_loss", cuda::launch_tangent_loss, loss));
  m.def("cuda_tangent_apply", function("tangent_apply", cuda::launch_tangent_apply, apply));
  m.def("cuda_tangent_gradient",
        function("tangent_gradient", cuda::launch_tangent_gradient, gradient));
  m.def("cuda_tangent_normalize",
        function("tangent_normalize", cuda::launch_tangent_normalize, normalize));
}

}  // namespace scm
