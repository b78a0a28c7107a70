"""Foreground, filled air and noise of an image, from its intensities alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["above_mean", "inner_fill", "noise_level"]

FILL_SHARE = 0.03  # of the voxels, at least; the most frequent value of tissue has up to 0.018 in 8-bit scans
FILL_LEAD = 5  # times as frequent as any other value nearby; values of tissue lead by less than 2
FILL_HEIGHT = 0.1  # of the range: air below is where the air of a magnitude lies


def noise_level(image: Tensor) -> Tensor:
    """Standard deviation of the white noise in each channel of ``(B, C, *S)``: ``(B, C, 1, ...)``.

    The median absolute diagonal coefficient of the Haar wavelet over 0.6745 (Donoho and Johnstone, Biometrika 81:425,
    1994). Coefficients of 0 do not count: air that was set to 0 holds no noise.
    """
    detail = image.float()
    for axis in range(2, image.ndim):
        if detail.shape[axis] > 1:
            pairs = detail.unfold(axis, 2, 2)
            detail = (pairs[..., 0] - pairs[..., 1]) / math.sqrt(2)
    detail = detail.abs().flatten(2).sort(dim=2, descending=True).values  # zeros come last
    middle = detail.count_nonzero(dim=2).unsqueeze(2) // 2
    return (detail.gather(2, middle) / 0.6745).unflatten(2, [1] * (image.ndim - 2))


def above_mean(image: Tensor) -> Tensor:
    """Coarse foreground of MRI at any intensity scale, where it is brighter than its mean; for ``CropForegroundd``."""
    return image > image.mean()


def inner_fill(image: Tensor, low: Tensor | float, high: Tensor | float) -> float | None:
    """The value of air that was filled with a value inside the range of the tissue; None if there is none.

    Z-scoring within the head leaves air at 0, the mean of the tissue, and so no affine scale of the scan puts air below
    tissue. Such air is recognised as one exact value, by far the most frequent one, well above the least.

    Args:
        image: of any shape.
        low: a low percentile of it.
        high: a high percentile of it.
    """
    span = float(high) - float(low)
    if not 0 < span < math.inf:
        return None
    level = ((image - low) / span).clamp(0, 1).mul(255).round().int().flatten()
    most = int(torch.bincount(level).argmax())
    if most <= 255 * FILL_HEIGHT:
        return None
    values, counts = image.flatten()[(level - most).abs() <= 8].unique(return_counts=True)
    first, *others = counts.sort(descending=True).values[:2].tolist()
    is_fill = first >= FILL_SHARE * image.numel() and all(first >= FILL_LEAD * other for other in others)
    return float(values[counts.argmax()]) if is_fill else None
