// What the bindings of the CPU kernels and of the CUDA kernels share: problems from Python's
// numbers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <iterator>
#include <optional>
#include <tuple>
#include <vector>

#include "problems.h"

namespace scm {

void add_cuda_functions(pybind11::module_& m);  // cuda/bindings.cpp, where that is built

// (address, type, stride of each of four dimensions), or None.
using Address = std::optional<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>>;

inline Tensor tensor(const Address& x) {
  if (!x) return {};
  const auto& [data, type, s0, s1, s2, s3] = *x;
  return {reinterpret_cast<char*>(data), {s0, s1, s2, s3}, static_cast<Type>(type)};
}

using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

template <class Problem>
Problem attention(const Sizes& sizes, bool causal, float scale,
                  const std::vector<Address>& inputs) {
  Problem p{};
  std::tie(p.b, p.h, p.hk, p.m, p.n, p.d, p.e) = sizes;
  p.causal = causal, p.scale = scale;
  Tensor* to[] = {&p.q, &p.k, &p.v, &p.tq, &p.tk, &p.tv, &p.mask, &p.tmask};
  for (size_t i = 0; i < std::size(to); ++i) *to[i] = tensor(inputs.at(i));
  return p;
}

// Address and stride of a row, in elements, of each of f, v, x, j.
using Rows = std::vector<std::tuple<uintptr_t, int64_t>>;

template <class Problem>
Problem tangent(int64_t b, int64_t d, int type, const Rows& inputs, uintptr_t coefficients) {
  Problem p{};
  p.b = b, p.d = d, p.type = static_cast<Type>(type);
  for (size_t i = 0; i < std::size(p.input); ++i) {
    p.input[i] = reinterpret_cast<const char*>(std::get<0>(inputs.at(i)));
    p.stride[i] = std::get<1>(inputs.at(i));
  }
  p.coefficients = reinterpret_cast<const double*>(coefficients);
  return p;
}

}  // namespace scm
