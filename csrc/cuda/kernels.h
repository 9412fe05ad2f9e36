// The CUDA kernels' hosts, for compute capability 8.0 and later. A host returns what the launch
// did: an error of the launch, or cudaErrorNotSupported where no kernel is compiled for a problem.
#pragma once

#include "problems.h"
#include "queue.h"

namespace scm {
namespace cuda {

// q, k, v and their tangents bfloat16 or float16, rows at multiples of 16 bytes, no mask, d = e one
// of 64, 72, 96, 112, 128.
cudaError_t launch_attention_forward(const AttentionForward& problem, Queue& queue);

// Whether this device runs the kernels: whether its driver takes this module's runtime and code.
cudaError_t usable(int device);

// `sums`: room for tangent_sums(problem) numbers, for samples that are cut into parts.
int64_t tangent_sums(const Tangent& problem);
cudaError_t launch_tangent_norm(const TangentNorm& problem, double* sums, Queue& queue);
cudaError_t launch_tangent_apply(const TangentApply& problem, Queue& queue);
cudaError_t launch_tangent_normalize(const TangentNormalize& problem, double* sums, Queue& queue);

}  // namespace cuda
}  // namespace scm
