"""What colours alone say: the accuracy that the network has to beat.

A classifier of colour statistics gives the four turns of a window one answer, so it is right for one of them at most:
its accuracy on (photograph, turn) is a quarter of its accuracy on the photograph, which is measured here.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from zfcuda.demo.data import TURNS

BINS = 16  # of each channel's histogram
LEVELS = 4  # of each channel in the joint histogram


def colour_statistics(pixels: torch.Tensor) -> NDArray[np.float32]:
    """Means, standard deviations, covariances and histograms of uint8 crops; blind to where a pixel is."""
    colours = pixels.flatten(2).double()
    pair = torch.triu_indices(3, 3)
    centred = colours - colours.mean(2, keepdim=True)
    covariance = (centred @ centred.transpose(1, 2) / colours.shape[2])[:, pair[0], pair[1]]
    code = torch.tensor([LEVELS**2, LEVELS, 1])[:, None]
    joint = _histogram(((pixels.flatten(2).long() * LEVELS // 256) * code).sum(1, keepdim=True), LEVELS**3)
    single = _histogram(pixels.flatten(2).long() * BINS // 256, BINS)
    spread = covariance.sign() * covariance.abs().sqrt()
    return torch.cat([colours.mean(2), spread, 256 * single, 256 * joint], 1).float().numpy()


def _histogram(codes: torch.Tensor, bins: int) -> torch.Tensor:
    """Fractions of each code: N x C x pixels to N x (C * bins)."""
    counts = torch.zeros(*codes.shape[:2], bins, dtype=torch.float64)
    counts.scatter_add_(2, codes, torch.ones(codes.shape, dtype=torch.float64))
    return (counts / codes.shape[2]).flatten(1)


def colour_baseline(
    train: torch.Tensor, train_photos: torch.Tensor, held_out: torch.Tensor, held_out_photos: torch.Tensor
) -> float:
    """Held-out accuracy on (photograph, turn) of the better of two classifiers of colour statistics."""
    known, asked = colour_statistics(train), colour_statistics(held_out)
    models = LogisticRegression(max_iter=500), KNeighborsClassifier(5)
    scores = [
        make_pipeline(StandardScaler(), model).fit(known, train_photos.numpy()).score(asked, held_out_photos.numpy())
        for model in models
    ]
    return float(max(scores)) / TURNS
