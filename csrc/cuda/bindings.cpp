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

Launches attention_forward(const Sizes& sizes, bool causal, float scale,
                           const std::vector<Address>& inputs, const Address& out,
                           const Address& t_out, uintptr_t lse, uintptr_t mu, int device,
                           Stream stream) {
  auto p = attention<AttentionForward>(sizes, causal, scale, inputs);
  p.out = tensor(out), p.t_out = tensor(t_out);
  p.lse = reinterpret_cast<float*>(lse), p.mu = reinterpret_cast<float*>(mu);
  return run("attention_forward", device, stream,
             [&](cuda::Queue& queue) { return cuda::launch_attention_forward(p, queue); });
}

std::optional<std::string> error(int device) {
  const cudaError_t error = cuda::usable(device);
  return error == cudaSuccess ? std::nullopt : std::make_optional(text(error));
}

int64_t tangent_sums(int64_t b, int64_t d, int type, const Rows& inputs, uintptr_t coefficients) {
  return cuda::tangent_sums(tangent<Tangent>(b, d, type, inputs, coefficients));
}

Launches tangent_norm(int64_t b, int64_t d, int type, const Rows& inputs, uintptr_t coefficients,
                      uintptr_t squares, uintptr_t sums, int device, Stream stream) {
  auto p = tangent<TangentNorm>(b, d, type, inputs, coefficients);
  p.squares = reinterpret_cast<double*>(squares);
  return run("tangent_norm", device, stream, [&](cuda::Queue& queue) {
    return cuda::launch_tangent_norm(p, reinterpret_cast<double*>(sums), queue);
  });
}

Launches tangent_apply(int64_t b, int64_t d, int type, const Rows& inputs, uintptr_t coefficients,
                       uintptr_t out, int device, Stream stream) {
  auto p = tangent<TangentApply>(b, d, type, inputs, coefficients);
  p.out = reinterpret_cast<char*>(out);
  return run("tangent_apply", device, stream,
             [&](cuda::Queue& queue) { return cuda::launch_tangent_apply(p, queue); });
}

Launches tangent_normalize(int64_t b, int64_t d, int type, const Rows& inputs,
                           uintptr_t coefficients, uintptr_t out, double count, double c, bool zero,
                           uintptr_t sums, int device, Stream stream) {
  auto p = tangent<TangentNormalize>(b, d, type, inputs, coefficients);
  p.out = reinterpret_cast<char*>(out), p.count = count, p.c = c, p.zero = zero;
  return run("tangent_normalize", device, stream, [&](cuda::Queue& queue) {
    return cuda::launch_tangent_normalize(p, reinterpret_cast<double*>(sums), queue);
  });
}

}  // namespace

void add_cuda_functions(py::module_& m) {
  m.def("cuda_error", &error, "Why a device does not run the kernels, None if it does.");
  m.def("cuda_attention_forward", &attention_forward);
  m.def("cuda_tangent_sums", &tangent_sums, "The numbers in float64 that `sums` has room for.");
  m.def("cuda_tangent_norm", &tangent_norm);
  m.def("cuda_tangent_apply", &tangent_apply);
  m.def("cuda_tangent_normalize", &tangent_normalize);
}

}  // namespace scm
