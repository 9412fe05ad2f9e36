// The head dimensions for which attention_forward.cu is compiled.

#include "kernels.h"

namespace scm {
namespace cuda {

cudaError_t launch_attention_forward_d64(const AttentionForward& problem, Queue& queue);
cudaError_t launch_attention_forward_d72(const AttentionForward& problem, Queue& queue);
cudaError_t launch_attention_forward_d96(const AttentionForward& problem, Queue& queue);
cudaError_t launch_attention_forward_d112(const AttentionForward& problem, Queue& queue);
cudaError_t launch_attention_forward_d128(const AttentionForward& problem, Queue& queue);

cudaError_t launch_attention_forward(const AttentionForward& problem, Queue& queue) {
  switch (problem.d) {
    case 64:
      return launch_attention_forward_d64(problem, queue);
    case 72:
      return launch_attention_forward_d72(problem, queue);
    case 96:
      return launch_attention_forward_d96(problem, queue);
    case 112:
      return launch_attention_forward_d112(problem, queue);
    case 128:
      return launch_attention_forward_d128(problem, queue);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace cuda
}  // namespace scm
