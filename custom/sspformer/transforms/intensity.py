"""Intensities brought to one range."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import InvertibleTransform, MapTransform, ScaleIntensityRange
from monai.transforms.utils_pytorch_numpy_unification import percentile
from torch import Tensor

from ..intensity import noise_level

__all__ = ["LeaveQuietd", "ScaleBetweenPercentilesd", "ScaleByPercentiled"]


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


class ScaleByPercentiled(MapTransform, InvertibleTransform):
    """Divide an image by a percentile of its values. Nothing is shifted or clipped, so the inverse is exact.

    Args:
        keys: entries to scale, MetaTensors.
        upper: the percentile that becomes 1, in (0, 100].
        allow_missing_keys: do not raise if a key is missing.

    Raises:
        ValueError: if ``upper`` is out of range, or an image has no value above 0.
    """

    def __init__(self, keys: KeysCollection, upper: float = 99.5, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 < upper <= 100:
            raise ValueError(f"upper must be a percentile in (0, 100], got {upper}.")
        self.upper = upper

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            scale = float(percentile(d[key], self.upper))
            if scale <= 0:  # a small object in a large field of view
                scale = float(d[key].max())
            if not 0 < scale < float("inf"):
                name = getattr(d[key], "meta", {}).get("filename_or_obj", key)
                raise ValueError(
                    f"{name} has no finite value above 0, its largest is {scale:g}: not a magnitude image."
                )
            d[key] = d[key] / scale
            self.push_transform(d[key], extra_info={"scale": scale})
        return d

    def inverse(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = d[key] * self.pop_transform(d[key])["extra_info"]["scale"]
        return d


class LeaveQuietd(MapTransform):
    """Where a whole scan has hardly any noise, give it back as it is: noise that weak cannot be told from texture.

    Judged on the whole scan, whose air and white matter show the noise bare; a window of cortex does not.

    Args:
        keys: denoised scans ``(C, *S)``.
        image_key: the scan before, on the same grid and scale, 1 for its brightest tissue.
        levels: of :func:`sspformer.intensity.noise_level`. At or below the first the scan is left as it is, at or
            above the second the result is taken whole, between them a mixture.

    Raises:
        ValueError: unless the levels are two ascending numbers above 0.
    """

    def __init__(
        self, keys: KeysCollection = "pred", image_key: str = "image", levels: Sequence[float] = (0.019, 0.022)
    ) -> None:
        super().__init__(keys)
        if len(levels) != 2 or not 0 < levels[0] < levels[1]:
            raise ValueError(f"levels must be two ascending numbers above 0, got {levels}.")
        self.image_key, self.levels = image_key, levels

    def share(self, image: Tensor) -> Tensor:
        """How much of the result counts, 0 to 1, for each channel: ``(C, 1, ...)`` for an image ``(C, *S)``."""
        low, high = self.levels
        level = noise_level(torch.as_tensor(image).as_subclass(Tensor)[None])[0]
        return ((level - low) / (high - low)).clamp(0, 1)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        before = torch.as_tensor(d[self.image_key]).as_subclass(Tensor)
        for key in self.key_iterator(d):
            pred = d[key]
            after = torch.as_tensor(pred).as_subclass(Tensor)
            d[key] = pred.clone()
            d[key][:] = torch.lerp(before.to(after), after, self.share(before).to(after))
        return d
