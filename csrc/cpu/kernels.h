// The CPU kernels. Every kernel is one source, compiled once for each instruction set into a
// namespace of its own; `dispatch.h` picks among them by what the processor has.
#pragma once

#include "problems.h"

namespace scm {

enum Status : int { kOk = 0, kOutOfMemory = 1 };

struct Kernels {
  const char* isa;  // the instruction set
  Status (*attention_forward)(const AttentionForward&);
  Status (*attention_backward)(const AttentionBackward&);
  Status (*tangent_norm)(const TangentNorm&);
  Status (*tangent_apply)(const TangentApply&);
  Status (*tangent_normalize)(const TangentNormalize&);
};

}  // namespace scm
