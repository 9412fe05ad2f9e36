"""JVP flash attention and sCM tangent kernels as drop-in PyTorch ops."""

from scm_kernels import trigflow
from scm_kernels._backends import backend, backends
from scm_kernels.attention.op import attention_jvp, scaled_dot_product_attention
from scm_kernels.tangent.op import consistency_loss, normalized_tangent
from scm_kernels.transforms.fused import fused
from scm_kernels.transforms.jvp import jvp

__all__ = [
    "attention_jvp",
    "backend",
    "backends",
    "consistency_loss",
    "fused",
    "jvp",
    "normalized_tangent",
    "scaled_dot_product_attention",
    "trigflow",
]
