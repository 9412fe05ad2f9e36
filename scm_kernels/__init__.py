"""JVP flash attention and sCM tangent kernels as drop-in PyTorch ops."""

from scm_kernels._backends import backend, backends
from scm_kernels.attention.op import attention_jvp, scaled_dot_product_attention
from scm_kernels.transforms.fused import fused
from scm_kernels.transforms.jvp import jvp

__all__ = ["attention_jvp", "backend", "backends", "fused", "jvp", "scaled_dot_product_attention"]
