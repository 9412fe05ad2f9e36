"""The Frechet distance in the feature space of a small classifier of the same digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 24
CLASSIFIER_SEED = 0  # fixed: every run is scored in the same feature space
CLASSIFIER_STEPS = 300
NOISE = 0.05
BOOTSTRAPS = 100


class Classifier(nn.Module):
    """Two convolutions, a linear bottleneck (the feature space) and ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * 16, FEATURES),
            nn.BatchNorm1d(FEATURES, affine=False),  # no feature outweighs another
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.silu(self.body(images)))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        return (self(images).argmax(1) == labels).double().mean().item()


def train_classifier(images: Tensor, labels: Tensor, steps: int = CLASSIFIER_STEPS) -> Classifier:
    """A few seconds on the training images, with a little noise against overfitting."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CLASSIFIER_SEED)
        model = Classifier()
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            index = torch.randint(len(images), (128,))
            noisy = images[index] + NOISE * torch.randn(128, *images.shape[1:])
            loss = F.cross_entropy(model(noisy), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features [N, D].

    The distance of Gaussians (Dowson and Landau 1982), used as in FID (arXiv 1706.08500, Eq. 6).
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features: got {tuple(a.shape)} and {tuple(b.shape)}, expected [N, D]")
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp_min(0.0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0.0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * cross
    return max(0.0, distance.item())


@dataclass(frozen=True)
class Estimate:
    """A distance with the standard deviation of its resampling."""

    value: float
    noise: float


def floor_distance(features: Tensor, labels: Tensor, splits: int = 20) -> Estimate:
    """The distance between two halves of the real data, each label halved: a perfect sampler's."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator)
        order = order[labels[order].argsort(stable=True)]  # neighbours share a label
        values.append(frechet_distance(features[order[::2]], features[order[1::2]]))
    return summarise(values)


def bootstrap(
    generated: Tensor, labels: Tensor, real: Tensor, rounds: int = BOOTSTRAPS
) -> list[float]:
    """Distances of resampled generated features; the reference and the share of a label are fixed.

    The same labels give the same resampling, so that two samplers' lists can be compared in pairs.
    """
    generator = torch.Generator().manual_seed(0)
    members = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    values = []
    for _ in range(rounds):
        index = torch.cat(
            [m[torch.randint(len(m), (len(m),), generator=generator)] for m in members]
        )
        values.append(frechet_distance(generated[index], real))
    return values


def summarise(values: list[float]) -> Estimate:
    tensor = torch.tensor(values, dtype=torch.float64)
    return Estimate(tensor.mean().item(), tensor.std().item())
