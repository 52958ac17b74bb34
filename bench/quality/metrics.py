"""The metrics of the quality benchmark, as functions of images, embeddings and attribute values."""

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
    """Return the share of outcomes that are true; 0 if there are none."""
    return sum(outcomes) / len(outcomes) if outcomes else 0.0


def frechet_distance(left: Floats, right: Floats) -> float:
    """Return the Fréchet distance of the normal distributions fitted to two sets of embeddings (images, width).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the FID of Heusel et al. 2017 (arXiv 1706.08500), as clean-fid
    computes it. It is biased upwards for few images, so only sets of the same size can be compared.
    """
    covariances = np.cov(left, rowvar=False), np.cov(right, rowvar=False)
    # The root's trace is the sum of the roots of the product's eigenvalues, which are real and not negative.
    roots = np.sqrt(np.clip(linalg.eigvals(covariances[0] @ covariances[1]).real, 0, None))
    shift = left.mean(axis=0) - right.mean(axis=0)
    return float(shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum())


def kernel_distance(left: Floats, right: Floats) -> float:
    """Return the squared maximum mean discrepancy of two sets of embeddings (images, width).

    The KID of Binkowski et al. 2018 (arXiv 1801.01401), with the kernel (x . y / width + 1)^3, over all images at once.
    The estimate is unbiased, and so can be below 0.
    """

    def kernel(one: Floats, other: Floats) -> Floats:
        return (one @ other.T / one.shape[1] + 1) ** 3

    def within(own: Floats) -> float:
        values = kernel(own, own)
        return (values.sum() - np.trace(values)) / (len(own) * (len(own) - 1))

    return float(within(left) + within(right) - 2 * kernel(left, right).mean())


def mean_pairwise_distance(embeddings: Floats) -> float:
    """Return the mean Euclidean distance of two different rows of `embeddings` (images, width)."""
    squares = (embeddings**2).sum(axis=1)
    distances = np.sqrt(np.clip(squares[:, None] + squares[None] - 2 * embeddings @ embeddings.T, 0, None))
    np.fill_diagonal(distances, 0)
    return float(distances.sum() / (len(embeddings) * (len(embeddings) - 1)))


def relative_entropy(values: Sequence[str], possible: Sequence[str]) -> float:
    """Return the entropy of `values` over that of the uniform distribution on `possible`.

    It is 1 for uniform values, as the renderer draws them, and 0 if all are the same. The correction of Miller and
    Madow for small samples, (distinct values - 1) / (2 values) nats, makes the mean of 64 uniform values about 1; a
    single sample can have more.
    """
    counts = np.array(list(Counter(values).values()), dtype=np.float64)
    if not counts.size:
        return 0.0
    shares = counts / counts.sum()
    entropy = -(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum())
    return float(entropy / math.log(len(possible)))


def saturation(images: Iterable[Image.Image]) -> float:
    """Return the images' mean saturation in HSV, 0 to 1."""
    return float(np.mean([np.asarray(image.convert("HSV"))[..., 1].mean() / 255 for image in images]))


def top_octave_power(pixels: Floats) -> float:
    """Return the variance of a grey patch at spatial frequencies of a quarter of a cycle per pixel and above.

    The patch is weighted by a Hann window, for whose power the result is corrected.

    Args:
        pixels: (height, width), 0 to 1.
    """
    window = np.outer(np.hanning(pixels.shape[0]), np.hanning(pixels.shape[1]))
    spectrum = np.abs(np.fft.fft2((pixels - pixels.mean()) * window)) ** 2
    across, down = np.meshgrid(np.fft.fftfreq(pixels.shape[1]), np.fft.fftfreq(pixels.shape[0]))
    return float(spectrum[np.hypot(across, down) >= 0.25].sum() / pixels.size / (window**2).sum())
