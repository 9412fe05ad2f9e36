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

template <class T>
T* pointer(uintptr_t x) {
  return reinterpret_cast<T*>(x);
}

inline AttentionForward forward(const Sizes& sizes, bool causal, float scale,
                                const std::vector<Address>& inputs, const Address& out,
                                const Address& t_out, uintptr_t lse, uintptr_t mu,
                                uintptr_t lse_low) {
  auto p = attention<AttentionForward>(sizes, causal, scale, inputs);
  p.out = tensor(out), p.t_out = tensor(t_out);
  p.lse = pointer<float>(lse), p.mu = pointer<float>(mu), p.lse_low = pointer<float>(lse_low);
  return p;
}

inline AttentionBackward backward(const Sizes& sizes, bool causal, float scale,
                                  const std::vector<Address>& inputs,
                                  const std::vector<Address>& saved, uintptr_t lse, uintptr_t mu,
                                  uintptr_t lse_low, const std::vector<Address>& gradients) {
  auto p = attention<AttentionBackward>(sizes, causal, scale, inputs);
  Tensor* from[] = {&p.out, &p.t_out, &p.dout, &p.dt_out};
  for (size_t i = 0; i < std::size(from); ++i) *from[i] = tensor(saved.at(i));
  p.lse = pointer<float>(lse), p.mu = pointer<float>(mu), p.lse_low = pointer<float>(lse_low);
  Tensor* to[] = {&p.dq, &p.dk, &p.dv, &p.dtq, &p.dtk, &p.dtv, &p.dmask, &p.dtmask};
  for (size_t i = 0; i < std::size(to); ++i) *to[i] = tensor(gradients.at(i));
  return p;
}

// Address and stride of a row, in elements, of each of f, v, x, j.
using Rows = std::vector<std::tuple<uintptr_t, int64_t>>;

// (address, stride in elements, whether float64) of a number a sample, or None.
using Number = std::optional<std::tuple<uintptr_t, int64_t, bool>>;

inline Numbers numbers(const Number& x) {
  if (!x) return {};
  const auto& [data, stride, wide] = *x;
  return {reinterpret_cast<char*>(data), stride, wide};
}

// t, warmup, r, sigma_data, c, preset, zero.
using Numbered = std::tuple<Number, Number, double, double, double, int, bool>;

inline Options options(const Numbered& x) {
  const auto& [t, warmup, r, sigma_data, c, preset, zero] = x;
  return {numbers(t), numbers(warmup), r, sigma_data, c, static_cast<Preset>(preset), zero};
}

template <class Problem>
Problem tangent(int64_t b, int64_t d, int type, const Rows& inputs, uintptr_t coefficients) {
  Problem p{};
  p.b = b, p.d = d, p.type = static_cast<Type>(type);
  for (size_t i = 0; i < std::size(p.input); ++i) {
    p.input[i] = reinterpret_cast<const char*>(std::get<0>(inputs.at(i)));
    p.stride[i] = std::get<1>(inputs.at(i));
  }
  p.coefficients = pointer<double>(coefficients);
  return p;
}

inline TangentLoss loss(int64_t b, int64_t d, int type, const Rows& inputs, uintptr_t coefficients,
                        const Numbered& numbered, const Number& log_weight, uintptr_t losses,
                        uintptr_t distances, uintptr_t weights) {
  auto p = tangent<TangentLoss>(b, d, type, inputs, coefficients);
  p.options = options(numbered), p.log_weight = numbers(log_weight);
  p.losses = pointer<float>(losses), p.distances = pointer<double>(distances);
  p.weights = pointer<double>(weights);
  return p;
}

inline TangentApply apply(int64_t b, int64_t d, int type, const Rows& inputs,
                          uintptr_t coefficients, uintptr_t out) {
  auto p = tangent<TangentApply>(b, d, type, inputs, coefficients);
  p.out = pointer<char>(out);
  return p;
}

inline TangentGradient gradient(int64_t b, int64_t d, int type, const Rows& inputs,
                                uintptr_t coefficients, uintptr_t out, uintptr_t scaled,
                                uintptr_t distances, uintptr_t weights, const Number& log_weight,
                                const Number& dlosses, const Number& dlog_weight) {
  auto p = tangent<TangentGradient>(b, d, type, inputs, coefficients);
  p.out = pointer<char>(out), p.scaled = pointer<double>(scaled);
  p.distances = pointer<double>(distances), p.weights = pointer<double>(weights);
  p.log_weight = numbers(log_weight), p.dlosses = numbers(dlosses);
  p.dlog_weight = numbers(dlog_weight);
  return p;
}

inline TangentNormalize normalize(int64_t b, int64_t d, int type, const Rows& inputs,
                                  uintptr_t coefficients, uintptr_t out, const Numbered& numbered) {
  auto p = tangent<TangentNormalize>(b, d, type, inputs, coefficients);
  p.out = pointer<char>(out), p.options = options(numbered);
  return p;
}

}  // namespace scm
