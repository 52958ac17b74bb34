"""What the quality bench measures, as functions of images, embeddings and readings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import linalg

Floats = NDArray[np.float64]


def share(outcomes: Sequence[bool]) -> float:
    """Of the outcomes, how many are true; 0 where there are none."""
    return sum(outcomes) / len(outcomes) if outcomes else 0.0


def frechet_distance(left: Floats, right: Floats) -> float:
    """Between the normal distributions fitted to two sets of embeddings (images, width).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the FID of Heusel et al. 2017 (arXiv 1706.08500), as clean-fid
    computes it. It falls with the number of images: compare sets of one size.
    """
    covariances = np.cov(left, rowvar=False), np.cov(right, rowvar=False)
    # The product of two covariances has real, non-negative eigenvalues, whose roots are those of the matrix root.
    roots = np.sqrt(np.clip(linalg.eigvals(covariances[0] @ covariances[1]).real, 0, None))
    shift = left.mean(axis=0) - right.mean(axis=0)
    return float(shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum())


def kernel_distance(left: Floats, right: Floats) -> float:
    """Squared maximum mean discrepancy of two sets of embeddings (images, width), unbiased: it can be below 0.

    With the kernel (x . y / width + 1)^3, the KID of Binkowski et al. 2018 (arXiv 1801.01401), over all images.
    """

    def kernel(one: Floats, other: Floats) -> Floats:
        return (one @ other.T / one.shape[1] + 1) ** 3

    def within(own: Floats) -> float:
        values = kernel(own, own)
        return (values.sum() - np.trace(values)) / (len(own) * (len(own) - 1))

    return float(within(left) + within(right) - 2 * kernel(left, right).mean())


def mean_pairwise_distance(embeddings: Floats) -> float:
    """Mean Euclidean distance of two different rows of `embeddings` (images, width)."""
    squares = (embeddings**2).sum(axis=1)
    distances = np.sqrt(np.clip(squares[:, None] + squares[None] - 2 * embeddings @ embeddings.T, 0, None))
    np.fill_diagonal(distances, 0)
    return float(distances.sum() / (len(embeddings) * (len(embeddings) - 1)))


def relative_entropy(values: Sequence[str], possible: Sequence[str]) -> float:
    """Entropy of what was drawn over that of a uniform draw from `possible`: 1 is the renderer's, 0 always the same.

    With the correction of Miller and Madow for few draws, (kinds - 1) / (2 draws) nats, so that a uniform draw of 64
    is near 1 in the mean; single values may lie above.
    """
    counts = np.array(list(Counter(values).values()), dtype=np.float64)
    if not counts.size:
        return 0.0
    shares = counts / counts.sum()
    entropy = -(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum())
    return float(entropy / math.log(len(possible)))


def saturation(images: Iterable[Image.Image]) -> float:
    """Mean saturation of HSV, 0 to 1."""
    return float(np.mean([np.asarray(image.convert("HSV"))[..., 1].mean() / 255 for image in images]))


def top_octave_power(pixels: Floats) -> float:
    """Variance of a grey patch (height, width), values 0 to 1, at a quarter of a cycle a pixel or more.

    By Parseval's theorem on the patch under a Hann window, over the window's own power.
    """
    window = np.outer(np.hanning(pixels.shape[0]), np.hanning(pixels.shape[1]))
    spectrum = np.abs(np.fft.fft2((pixels - pixels.mean()) * window)) ** 2
    across, down = np.meshgrid(np.fft.fftfreq(pixels.shape[1]), np.fft.fftfreq(pixels.shape[0]))
    return float(spectrum[np.hypot(across, down) >= 0.25].sum() / pixels.size / (window**2).sum())
