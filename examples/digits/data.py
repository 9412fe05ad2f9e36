"""The 1,797 handwritten digits that scikit-learn ships, scaled to sigma_data = 0.5."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SIGMA_DATA = 0.5
SPLIT_SEED = 0  # the split is fixed: --seed changes the training, never the data it is scored on
PIXEL_MAX = 16.0


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] with the training images at mean 0 and standard deviation sigma_data."""

    train_images: Tensor
    train_labels: Tensor
    held_images: Tensor
    held_labels: Tensor
    mean: float
    std: float

    def to_pixels(self, images: Tensor) -> Tensor:
        """Back to [0, 1] for a picture."""
        raw = images / SIGMA_DATA * self.std + self.mean
        return (raw / PIXEL_MAX).clamp(0.0, 1.0)


def load(held_fraction: float = 0.5) -> Digits:
    """Load and split, stratified by label; sigma_data = 0.5 as in arXiv 2410.11081, section 3."""
    raw, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        raw.reshape(-1, 1, 8, 8).astype(np.float32),
        labels.astype(np.int64),
        test_size=held_fraction,
        random_state=SPLIT_SEED,
        stratify=labels,
    )
    train_images, held_images, train_labels, held_labels = (torch.from_numpy(p) for p in parts)
    mean, std = train_images.mean().item(), train_images.std().item()
    return Digits(
        train_images=(train_images - mean) / std * SIGMA_DATA,
        train_labels=train_labels,
        held_images=(held_images - mean) / std * SIGMA_DATA,
        held_labels=held_labels,
        mean=mean,
        std=std,
    )
