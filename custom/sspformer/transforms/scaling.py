"""Intensities brought to one range."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, ScaleIntensityRange
from monai.transforms.utils_pytorch_numpy_unification import percentile
from torch import Tensor

__all__ = ["ScaleBetweenPercentilesd"]


class ScaleBetweenPercentilesd(MapTransform):
    """Two percentiles of an image's values become 0 and 1; what lies beyond them is clipped.

    It gives the numbers of MONAI's ``ScaleIntensityRangePercentilesd``, which leaves an image as it is if both
    percentiles are the same, as they are of a small object in a large field of view: the value of the air. Here the
    maximum then takes the place of the upper one. An image of one value becomes 0.

    Args:
        keys: entries to scale, of a floating point type.
        lower: the percentile that becomes 0, at least 0.
        upper: the percentile that becomes 1, above ``lower``, at most 100.
        allow_missing_keys: do not raise if a key is missing.

    Raises:
        ValueError: if a percentile is out of its range.
    """

    def __init__(
        self, keys: KeysCollection, lower: float = 0.5, upper: float = 99.5, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 <= lower < upper <= 100:
            raise ValueError(f"lower and upper must be ascending percentiles in [0, 100], got {lower} and {upper}.")
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = torch.as_tensor(d[key]).as_subclass(Tensor)
            low, high = percentile(image, self.lower), percentile(image, self.upper)
            if low == high:
                high = image.max()
            d[key] = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)(d[key])
        return d
