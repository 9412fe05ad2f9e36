"""Small networks, the truth of their jvp, and counters of products and of bytes.

The truth is `torch.func.jvp` in float64, with eager attention and with layer and batch norm written
by hand: PyTorch's own formulas for the tangents of these two are right in value, but take mean and
variance for constants, so that the gradient through the tangent is wrong in the input. It has no
gradient of a GLU's tangent, nor of a hard sigmoid's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import scm_kernels
from scm_kernels.transforms import multihead


def normalized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """x without mean and scale, as a composition that autograd differentiates to any order."""
    x = x - x.mean(dims, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    y = normalized(x, tuple(range(-len(shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    channels = (-1, *(1,) * (x.ndim - 2))
    if training:
        y = normalized(x, (0, *range(2, x.ndim)), eps)
    else:
        y = (x - running_mean.view(channels)) * (running_var.view(channels) + eps).rsqrt()
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def instance_norm(x, running_mean=None, running_var=None, weight=None, bias=None, **rest):
    channels = (-1, *(1,) * (x.ndim - 2))
    y = normalized(x, tuple(range(2, x.ndim)), 1e-5)
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def glu(x, dim=-1):
    a, b = x.chunk(2, dim)
    return a * b.sigmoid()


BY_HAND = {
    F.layer_norm: layer_norm,
    torch.layer_norm: lambda *args: layer_norm(*args[:5]),
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.glu: glu,
    F.hardsigmoid: lambda x, inplace=False: (x / 6 + 0.5).clamp(0, 1),
}


class ByHand(TorchFunctionMode):
    """Takes the functions of `BY_HAND` to their compositions, in `nn.MultiheadAttention` too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # keep the slow path, like any mode
            with self:
                return multihead._forward(*args, **kwargs)
        return BY_HAND.get(func, func)(*args, **kwargs)


def true_jvp(func, primals, tangents, **options):
    """`torch.func.jvp` by the formulas, nothing of this package inside."""
    with sdpa_kernel(SDPBackend.MATH), ByHand():
        return torch.func.jvp(func, primals, tangents, **options)


def stock_jvp(func, primals, tangents, **options):
    """`torch.func.jvp` of unmodified PyTorch with its eager attention."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(func, primals, tangents, **options)


def floats(tree) -> list[Tensor]:
    """The tensors of a tree that can have a derivative."""
    leaves = pytree.tree_leaves(tree)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def gradients(out, t_out, parameters, *, through_tangent: bool) -> list[Tensor]:
    """Of a loss that mixes out with t_out, in the parameters; t_out a constant unless told."""
    loss = 0.0
    for x, tx in zip(floats(out), floats(t_out), strict=True):
        weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
        tx = tx if through_tangent else tx.detach()
        loss = loss + (x * tx).mean() + (weight * x).mean()
        loss = loss + (weight * tx.square()).mean() if through_tangent else loss
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def close(actual, truth, rtol: float = 1e-10, name: str = "value") -> None:
    """Trees of the same structure whose tensors agree within rtol of the truth's largest element.

    The scale is that of the whole tree: a gradient that is zero by symmetry has none of its own.
    """
    left, right = pytree.tree_flatten(actual), pytree.tree_flatten(truth)
    assert left[1] == right[1], f"{name}: structure {left[1]}, not {right[1]}"
    pairs = list(zip(left[0], right[0], strict=True))
    sizes = [y.detach().abs().max() for _, y in pairs if y.is_floating_point() and y.numel() > 0]
    scale = float(max(sizes)) if sizes else 0.0
    for i, (x, y) in enumerate(pairs):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), f"{name}[{i}]: {x.shape} {x.dtype}"
        if not y.is_floating_point():
            assert torch.equal(x, y), f"{name}[{i}] differs"
        elif y.numel() > 0:
            error = float((x - y).detach().abs().max())
            assert error <= rtol * scale, f"{name}[{i}]: error {error:.2e}, largest {scale:.2e}"


def check_jvp(func, primals, tangents, parameters=(), *, rtol: float = 1e-10, jvp=None) -> None:
    """out, t_out and the gradients of the parameters against the truth, tangent_grad both ways."""
    parameters = list(parameters)
    for through in (False, True):
        truth = true_jvp(func, primals, tangents)
        ours = (jvp or scm_kernels.jvp)(func, primals, tangents, tangent_grad=through)
        close(ours[0], truth[0], rtol, "out")
        close(ours[1], truth[1], rtol, "t_out")
        if parameters:
            want = gradients(*truth, parameters, through_tangent=through)
            got = gradients(*ours, parameters, through_tangent=through)
            close(got, want, 10 * rtol, f"gradient, tangent_grad={through}")


# --- a diffusion transformer ----------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block whose scale, shift and gates come from t."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.modulation = nn.Linear(width, 4 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift, gate1, gate2 = self.modulation(F.silu(c))[:, None].chunk(4, dim=-1)
        h = self.qkv(self.norm1(x) * (1 + scale) + shift)
        q, k, v = h.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + gate1 * self.proj(h.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x))


class DiT(nn.Module):
    """[B, M, width], [B] -> [B, M, width]"""

    def __init__(self, depth: int = 2, width: int = 16, heads: int = 2):
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.embed(torch.stack([t.cos(), t.sin()], dim=-1))
        for block in self.blocks:
            x = block(x, c)
        return x


def dit_case(dtype=torch.float64, *, batch=2, tokens=5, seed=0, **shape):
    """(network, primals, tangents) of a small DiT."""
    torch.manual_seed(seed)
    network = DiT(**shape).to(dtype)
    width = network.embed.out_features
    x, tx = torch.randn(2, batch, tokens, width, dtype=dtype)
    t, tt = torch.rand(2, batch, dtype=dtype)
    return network, (x, t), (tx, tt)


# --- counters -------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Counts ops as they are below autograd and functorch."""

    PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution", "mv", "dot"})

    def __init__(self):
        super().__init__()
        self.names = []

    @property
    def products(self) -> int:
        """Matrix products and convolutions."""
        return sum(name in self.PRODUCTS for name in self.names)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
