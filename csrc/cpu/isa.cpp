// The table of the kernels of one instruction set.
#include "isa.h"

#define SCM_TEXT(x) #x
#define SCM_NAME(x) SCM_TEXT(x)

namespace scm {
namespace SCM_ISA {

extern const Kernels kernels;
const Kernels kernels = {SCM_NAME(SCM_ISA), attention_forward, attention_backward,
                         tangent_norm,      tangent_apply,     tangent_normalize};

}  // namespace SCM_ISA
}  // namespace scm
