"""Sizes of random crops."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["crop_range"]


def crop_range(crop_size: Sequence[int], jitter: Sequence[float]) -> tuple[list[int], list[int]]:
    """Sides of the smallest and of the largest crop of a 3D scan, for crops that are then resized to ``crop_size``.

    A network that is pretrained on them sees structures in several sizes.

    Args:
        crop_size: sides in voxels, three, or two for crops of one axial slice.
        jitter: smallest and largest share of each side.

    Returns:
        two lists of three sides, the last 1 for slices.

    Raises:
        ValueError: if ``jitter`` is not ascending and above 0.
    """
    low, high = jitter
    if not 0 < low <= high:
        raise ValueError(f"jitter must be two ascending numbers above 0, got {list(jitter)}.")
    slices = [1] * (3 - len(crop_size))
    return [math.ceil(side * low) for side in crop_size] + slices, [
        math.floor(side * high) for side in crop_size
    ] + slices
