// The loss, its gradient and the normalised tangent of the CPU: the numbers of each sample by
// presets.h, and the passes over its elements by the kernels of the instruction set in use.
#include "dispatch.h"
#include "parallel.h"
#include "presets.h"

namespace scm {
namespace {

// Samples of a work item: some 20 us of sines and cosines.
constexpr int64_t kSamples = 512;

template <class Body>
Status for_samples(const Tangent& p, const Body& body) {
  return parallel_for((p.b + kSamples - 1) / kSamples, p.threads, 0, [&](int64_t item, char*) {
    const int64_t end = (item + 1) * kSamples;
    for (int64_t i = item * kSamples; i < (end < p.b ? end : p.b); ++i) body(i);
  });
}

}  // namespace

Status tangent_loss(const TangentLoss& p) {
  for_samples(p, [&](int64_t i) { sample::coefficients(p.options, i, p.coefficients); });
  const Status status = kernels().tangent_norm(TangentNorm{p, p.distances});
  for_samples(p, [&](int64_t i) { sample::loss(p, i); });
  return status;
}

Status tangent_apply(const TangentApply& p) { return kernels().tangent_apply(p); }

Status tangent_gradient(const TangentGradient& p) {
  for_samples(p, [&](int64_t i) { sample::gradient(p, i); });
  TangentApply scaled = p;
  scaled.coefficients = p.scaled;
  return kernels().tangent_apply(scaled);
}

Status tangent_normalize(const TangentNormalize& p) {
  for_samples(p, [&](int64_t i) { sample::coefficients(p.options, i, p.coefficients); });
  return kernels().tangent_normalize(p);
}

}  // namespace scm
