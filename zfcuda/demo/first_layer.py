"""Where layer 1 starts: at the typical small patches of the photographs.

The paper trains for days, in which layer 1 grows its edges and colours out of noise. The demo has minutes, too few for
the noise to wear off; so its layer 1 starts from cluster centres of whitened patches, found without labels (Coates &
Ng, "Learning Feature Representations with K-means", 2012), and is then trained with all other layers.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from zfcuda.demo.data import normalise, turn

CROPS, PATCHES = 500, 30  # looked at, each in its four turns; patches of each
FLAT = 0.4  # of the patches are left out, those with the least contrast
WHITENING = 0.2  # added to the patches' variances, which are about 1: how far fine grain is kept down


def typical_patches(pixels: torch.Tensor, count: int, size: int, seed: int) -> torch.Tensor:
    """Filters (count, 3, size, size) of root mean square 1 from crops (uint8, N x 3 x height x width)."""
    draw = np.random.default_rng(seed)
    patches = _patches(turn(normalise(pixels[:CROPS])).numpy(), size, draw)
    contrast = patches.std(1)
    patches = patches[contrast > np.quantile(contrast, FLAT)]
    patches -= patches.mean(1, keepdims=True)
    patches /= patches.std(1, keepdims=True)
    variances, axes = np.linalg.eigh(np.cov(patches.T))
    whiten = (axes * (variances + WHITENING) ** -0.5) @ axes.T
    clusters = MiniBatchKMeans(count, batch_size=2048, n_init=1, max_iter=30, random_state=seed).fit(patches @ whiten)
    filters = clusters.cluster_centers_ @ np.linalg.inv(whiten)
    filters /= np.sqrt(np.square(filters).mean(1, keepdims=True))
    return torch.from_numpy(filters).float().view(count, 3, size, size)


def _patches(crops: np.ndarray, size: int, draw: np.random.Generator) -> np.ndarray:
    """PATCHES patches of every crop at random places, flat, in float64."""
    windows = np.lib.stride_tricks.sliding_window_view(crops, (size, size), (2, 3))
    rows, columns = (draw.integers(0, n, (len(crops), PATCHES)) for n in windows.shape[2:4])
    chosen = windows[np.arange(len(crops))[:, None], :, rows, columns]
    return chosen.reshape(len(crops) * PATCHES, -1).astype(np.float64)
