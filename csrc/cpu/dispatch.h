// Which build of the kernels runs: the best that the processor has, unless one is named.
#pragma once

#include <vector>

#include "kernels.h"

namespace scm {

// The instruction sets that this module was compiled for and that this processor has, best first.
const std::vector<Kernels>& available_kernels();

// The kernels in use.
const Kernels& kernels();

// Use those of an instruction set by its name; false if they are not available.
bool select_kernels(const char* isa);

// The steps of the ops on the kernels in use.
Status attention_forward(const AttentionForward& p);
Status attention_backward(const AttentionBackward& p);
Status tangent_loss(const TangentLoss& p);
Status tangent_apply(const TangentApply& p);
Status tangent_gradient(const TangentGradient& p);
Status tangent_normalize(const TangentNormalize& p);

}  // namespace scm
