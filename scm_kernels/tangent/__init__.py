"""The sCM tangent, its normalisation and its loss."""

from scm_kernels.tangent.op import consistency_loss, normalized_tangent

__all__ = ["consistency_loss", "normalized_tangent"]
