// The kernels of attention's forward: the head dimensions for which attention_forward.cu and
// attention_forward_hopper.cu are compiled.

#include <limits>

#include "kernels.h"

namespace scm {
namespace cuda {

#define SCM_HEAD_DIMS(X) X(64) X(72) X(96) X(112) X(128)

#define SCM_DECLARE(d)                                                                      \
  cudaError_t launch_attention_forward_d##d(const AttentionForward& problem, Queue& queue); \
  cudaError_t launch_attention_forward_hopper_d##d(const AttentionForward& problem,         \
                                                   int processors, Queue& queue);
SCM_HEAD_DIMS(SCM_DECLARE)

namespace {

// Tangents of queries, keys and values, or of queries alone; rows of keys and values less than 2^31
// bytes apart.
bool hopper_takes(const AttentionForward& p) {
  for (const Tensor* x : {&p.k, &p.tk, &p.v, &p.tv}) {
    if (2 * x->stride[2] > std::numeric_limits<int>::max()) return false;
  }
  return p.tq && bool(p.tk) == bool(p.tv);
}

}  // namespace

cudaError_t launch_attention_forward(const AttentionForward& problem, Queue& queue) {
  const int processors = hopper_takes(problem) ? queue.hopper_processors() : 0;
#define SCM_CASE(d)                                                                          \
  case d:                                                                                    \
    return processors > 0 ? launch_attention_forward_hopper_d##d(problem, processors, queue) \
                          : launch_attention_forward_d##d(problem, queue);
  switch (problem.d) {
    SCM_HEAD_DIMS(SCM_CASE)
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace cuda
}  // namespace scm
