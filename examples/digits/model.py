"""A small class-conditional DiT whose forward-mode derivative stays finite and small.

The parts follow section 4 of arXiv 2410.11081 (Simplifying, Stabilizing and Scaling Continuous-Time
Consistency Models): the identity time transform c_noise(t) = t, a positional time embedding of low
frequency, adaptive double normalisation, and RMS-normalised queries and keys. Attention is the
unmodified ``F.scaled_dot_product_attention``: ``scm_kernels.jvp`` reroutes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXEL_NORM_EPS = 1e-8


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network; the defaults are those of the four-minute CPU run."""

    image_size: int = 8
    patch: int = 2
    width: int = 64
    depth: int = 3
    heads: int = 2
    mlp_ratio: int = 3
    classes: int = 10
    max_frequency: float = 2.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise ValueError(f"patch: {self.patch} does not divide image_size {self.image_size}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width: got {self.width}, expected even, a multiple of {self.heads}")

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2


def pixel_norm(a: Tensor) -> Tensor:
    """a / sqrt(mean_c a^2 + 1e-8) over the channels (arXiv 2410.11081, section 4.1)."""
    return a * torch.rsqrt(a.square().mean(-1, keepdim=True) + PIXEL_NORM_EPS)


class TimeEmbedding(nn.Module):
    """Positional (sin / cos) embedding of c_noise(t) = t, in float32 even for half-precision t."""

    def __init__(self, width: int, max_frequency: float) -> None:
        super().__init__()
        exponents = torch.linspace(0.0, 1.0, width // 2)
        frequencies = max_frequency * (1.0 / (8.0 * max_frequency)) ** exponents  # down to 1 / 8
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        angles = t[:, None] * self.frequencies.to(t.dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=-1) * math.sqrt(2.0)


class Attention(nn.Module):
    """Multi-head self-attention with RMS-normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, M, D]
        q = F.rms_norm(q, q.shape[-1:])
        k = F.rms_norm(k, k.shape[-1:])
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """A transformer block; before each of its parts y = norm(x) pnorm(s(t)) + pnorm(b(t))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.attention = Attention(config.width, config.heads)
        self.up = nn.Linear(config.width, hidden)
        self.down = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        x = x + self.attention(modulate(x, modulation[:, 0:1], modulation[:, 1:2]))
        hidden = self.up(modulate(x, modulation[:, 2:3], modulation[:, 3:4]))
        return x + self.down(F.silu(hidden))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Adaptive double normalisation; scale and shift [B, 1, C] are already pixel-normalised."""
    return F.rms_norm(x, x.shape[-1:]) * scale + shift


class DiT(nn.Module):
    """F(x / sd, t, label), arXiv 2410.11081, section 3: [B, 1, S, S], [B], [B] -> [B, 1, S, S]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_in = nn.Linear(config.patch**2, width)
        self.position = nn.Parameter(0.5 * torch.randn(1, config.tokens, width))
        self.time = TimeEmbedding(width, config.max_frequency)
        self.time_in = nn.Linear(width, width)
        self.label = nn.Embedding(config.classes, width)
        self.modulation = nn.Linear(width, (4 * config.depth + 2) * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.patch_out = nn.Linear(width, config.patch**2)
        self._initialise()

    def _initialise(self) -> None:
        """Residual branches and the output start at zero, the modulation's scales at about one."""
        for block in self.blocks:
            nn.init.zeros_(block.attention.proj.weight)
            nn.init.zeros_(block.down.weight)
        nn.init.zeros_(self.patch_out.weight)
        nn.init.zeros_(self.patch_out.bias)
        with torch.no_grad():
            self.modulation.bias.view(-1, 2, self.config.width)[:, 0] += 1.0

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        condition = F.silu(self.time_in(self.time(t).to(x.dtype)) + self.label(label))
        modulation = self.modulation(condition).view(len(x), -1, self.config.width)
        modulation = pixel_norm(modulation)  # every s(t) and b(t) of the network at once
        h = self.patch_in(patchify(x, self.config.patch)) + self.position
        for i, block in enumerate(self.blocks):
            h = block(h, modulation[:, 4 * i : 4 * i + 4])
        h = self.patch_out(modulate(h, modulation[:, -2:-1], modulation[:, -1:]))
        return unpatchify(h, self.config.patch, self.config.image_size)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, 1, S, S] -> [B, (S / p)^2, p^2]."""
    batch, _, size, _ = x.shape
    side = size // patch
    x = x.reshape(batch, side, patch, side, patch).transpose(2, 3)
    return x.reshape(batch, side * side, patch * patch)


def unpatchify(h: Tensor, patch: int, size: int) -> Tensor:
    """[B, (S / p)^2, p^2] -> [B, 1, S, S]."""
    side = size // patch
    h = h.reshape(len(h), side, side, patch, patch).transpose(2, 3)
    return h.reshape(len(h), 1, size, size)


class LogWeight(nn.Module):
    """The scalar w(t) of the adaptive weighting (arXiv 2410.11081, Algorithm 1), zero at first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.time = TimeEmbedding(config.width, config.max_frequency)
        self.out = nn.Linear(config.width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.time(t)).squeeze(-1)
