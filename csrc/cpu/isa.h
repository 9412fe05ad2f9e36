// The kernels of one instruction set, the one that this source is being compiled for.
#pragma once

#include "kernels.h"

namespace scm {
namespace SCM_ISA {

Status attention_forward(const AttentionForward& p);
Status attention_backward(const AttentionBackward& p);
Status tangent_norm(const TangentNorm& p);
Status tangent_apply(const TangentApply& p);
Status tangent_normalize(const TangentNormalize& p);

}  // namespace SCM_ISA
}  // namespace scm
