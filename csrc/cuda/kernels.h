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

// The numbers that `sums` of b samples of d elements has room for, where those are cut into parts.
int64_t tangent_sums(int64_t b, int64_t d);
cudaError_t launch_tangent_loss(const TangentLoss& problem, Queue& queue);
cudaError_t launch_tangent_apply(const TangentApply& problem, Queue& queue);
cudaError_t launch_tangent_gradient(const TangentGradient& problem, Queue& queue);
cudaError_t launch_tangent_normalize(const TangentNormalize& problem, Queue& queue);

}  // namespace cuda
}  // namespace scm
