"""Foreground and noise of an image, from its intensities alone."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["above_mean", "noise_level"]


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
