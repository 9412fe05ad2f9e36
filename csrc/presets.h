// The relatives of the sCM loss: the numbers of a sample, on any processor. The formulas of
// scm_kernels/tangent/presets.py and reference.py, in float64.
#pragma once

#include <cmath>
#include <cstdint>

#include "problems.h"

#ifdef __CUDACC__
#define SCM_ANYWHERE __host__ __device__
#else
#define SCM_ANYWHERE
#endif

namespace scm {
namespace sample {

SCM_ANYWHERE inline double number(const Numbers& x, int64_t i) {
  return x.wide ? reinterpret_cast<const double*>(x.data)[i * x.stride]
                : reinterpret_cast<const float*>(x.data)[i * x.stride];
}

// a, b, k, d of sample i.
SCM_ANYWHERE inline void coefficients(const Options& o, int64_t i, double* all) {
  double* const to = all + 4 * i;
  const double t = number(o.t, i), r = o.warmup.data ? number(o.warmup, i) : o.r, sd = o.sigma_data;
  if (o.preset == Preset::kMeanflow) {
    to[0] = -1.0, to[1] = 1.0, to[2] = 0.0, to[3] = -t;
    return;
  }
  const double cosine = cos(t), sine = sin(t);
  const bool rcm = o.preset == Preset::kRcm;
  double front = cosine * cosine;
  // cos^2 + (1 - r^2) sin^2 is 1 - r^2 sin^2 without its cancellation near r = 1, t = pi/2.
  if (rcm) front = cosine * sqrt(front + (1.0 - r * r) * sine * sine);
  to[0] = -sd * front, to[1] = front, to[2] = -r * cosine * sine, to[3] = rcm ? -sd : -sd * r;
}

// s of a sample of `size` elements; NaN where the sum of its squares is not finite, for
// 1 / infinity would make zeros of a sample that is to be seen; or 0 where it is left out.
SCM_ANYWHERE inline double scale(const Options& o, double squares, double size) {
  if (!(squares < INFINITY)) return o.zero ? 0.0 : NAN;
  if (o.preset == Preset::kMeanflow) return 1.0;
  return 1.0 / (sqrt(o.preset == Preset::kRms ? squares / size : squares) + o.c);
}

// p of sample i; 0, which none other has, where it is left out.
SCM_ANYWHERE inline double weight(const Options& o, int64_t i, double squares, double size) {
  const bool finite = squares < INFINITY;
  if (!finite && o.zero) return 0.0;
  switch (o.preset) {
    case Preset::kSana: {
      const double t = number(o.t, i);
      return cos(t) / (size * o.sigma_data * sin(t));
    }
    case Preset::kRcm:
      return 100.0;
    case Preset::kMeanflow:
      return finite ? 1.0 / (squares + o.c) : NAN;
    default:
      return 1.0 / size;
  }
}

// Sample i of the loss, whose coefficients are there, and the sum of its squares for a distance.
SCM_ANYWHERE inline void loss(const TangentLoss& p, int64_t i) {
  double* const to = p.coefficients + 4 * i;
  const double squares = p.distances[i], s = scale(p.options, squares, p.d);
  const double rate = weight(p.options, i, squares, p.d);
  const bool left_out = rate == 0.0;
  const double q = left_out ? 0.0 : s * s * squares;
  const double w = p.log_weight.data ? number(p.log_weight, i) : 0.0;
  for (int k = 0; k < 4; ++k) to[k] = left_out ? 0.0 : s * to[k];
  p.distances[i] = q, p.weights[i] = rate;
  p.losses[i] = left_out ? 0.0f : static_cast<float>(exp(w) * (rate * q) - w);
}

// -2 dL exp(w) p times the coefficients of sample i; and dw.
SCM_ANYWHERE inline void gradient(const TangentGradient& p, int64_t i) {
  const double dloss = number(p.dlosses, i);
  const bool left_out = p.weights[i] == 0.0;
  const double rate = (p.log_weight.data ? exp(number(p.log_weight, i)) : 1.0) * p.weights[i];
  for (int k = 0; k < 4; ++k) {
    const double x = p.coefficients[4 * i + k];
    p.scaled[4 * i + k] = left_out ? 0.0 : -2.0 * dloss * rate * x;
  }
  const double slope = left_out ? 0.0 : dloss * (rate * p.distances[i] - 1.0);
  const int64_t at = i * p.dlog_weight.stride;
  if (p.dlog_weight.wide) {
    reinterpret_cast<double*>(p.dlog_weight.data)[at] = slope;
  } else {
    reinterpret_cast<float*>(p.dlog_weight.data)[at] = static_cast<float>(slope);
  }
}

}  // namespace sample
}  // namespace scm
