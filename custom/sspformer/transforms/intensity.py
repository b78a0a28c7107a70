"""Intensities on one scale, and denoised scans blended with what came in."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import InvertibleTransform, MapTransform, ScaleIntensityRange
from monai.transforms.utils_pytorch_numpy_unification import percentile
from torch import Tensor

from ..intensity import inner_fill, noise_level


class ScaleByPercentilesd(MapTransform, InvertibleTransform):
    """Bring the intensities of images to one scale, by percentiles of their values.

    ``lower`` becomes 0, ``upper`` becomes 1, and what lies beyond is clipped. The numbers are those of MONAI's
    ``ScaleIntensityRangePercentilesd``, but for two cases. Both percentiles of a small object in a large field of view
    are the value of the air. MONAI leaves such an image unscaled; here its maximum takes the place of ``upper``. And
    air that was filled with a value inside the range of the tissue becomes 0, see
    :func:`sspformer.intensity.inner_fill`.

    Without ``lower`` the image becomes a magnitude, which can be inverted: it is divided by ``upper``. If its air does
    not lie near 0, as in a scan that was z-scored or has an offset, that of the air is subtracted first.

    Args:
        keys: images of a floating point type, MetaTensors if they are to be inverted.
        lower: percentile that becomes 0, at least 0; None: nothing is clipped.
        upper: percentile that becomes 1, above ``lower``, at most 100.
        allow_missing_keys: do not raise if a key is missing.

    Raises:
        ValueError: if a percentile is out of its range; naming the file, if an image has one value only; and, without
            ``lower``, if no affine scale makes a magnitude of it, because its air lies inside the range of the tissue.
    """

    AIR = 0.5  # percentile of the air
    #: of the upper percentile: air in this range is that of a magnitude; a crop without air, or a noisy one, has much
    NEAR_0 = (-0.05, 0.5)

    def __init__(
        self, keys: KeysCollection, lower: float | None = 0.5, upper: float = 99.5, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if lower is None and not 0 < upper <= 100:
            raise ValueError(f"upper must be a percentile in (0, 100], got {upper}.")
        if lower is not None and not 0 <= lower < upper <= 100:
            raise ValueError(f"lower and upper must be ascending percentiles in [0, 100], got {lower} and {upper}.")
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = torch.as_tensor(d[key]).as_subclass(Tensor)
            name = getattr(d[key], "meta", {}).get("filename_or_obj", key)
            if image.min() == image.max():
                raise ValueError(f"{name}: all voxels have the same value, {float(image.max()):g}.")
            low = percentile(image, self.AIR if self.lower is None else self.lower)
            high = percentile(image, self.upper)
            if high <= low:
                high = image.max()
            fill = inner_fill(image, low, high)
            if self.lower is None:
                d[key] = self._as_magnitude(d[key], float(low), float(high), fill, name)
                continue
            if fill is not None:
                d[key] = d[key].masked_fill(d[key] == fill, float(low))
            d[key] = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)(d[key])
        return d

    def _as_magnitude(self, image: Tensor, low: float, high: float, fill: float | None, name: str) -> Tensor:
        if fill is not None:
            raise ValueError(
                f"{name} is no magnitude image: its air, at {fill:.4g}, lies inside the range of its tissue, {low:.4g} "
                f"to {high:.4g} (z-scored within the head?). Take the scan before it was normalised."
            )
        offset = 0.0 if self.NEAR_0[0] * high <= low <= self.NEAR_0[1] * high else low
        scale = high - offset
        if not 0 < scale < math.inf:
            raise ValueError(f"{name} is no magnitude image: its intensities span {scale:g}.")
        image = (image - offset if offset else image) / scale
        self.push_transform(image, extra_info={"offset": offset, "scale": scale})
        return image

    def inverse(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Bring a magnitude back to its own scale; what was clipped stays as it is."""
        d = dict(data)
        for key in self.key_iterator(d) if self.lower is None else ():
            info = self.pop_transform(d[key])["extra_info"]
            d[key] = d[key] * info["scale"]
            if info["offset"]:
                d[key] = d[key] + info["offset"]
        return d


class BlendByNoiseLeveld(MapTransform):
    """Give a scan with hardly any noise back as it came in: such weak noise cannot be told from texture.

    The noise is measured on the whole scan, because air and white matter show it bare; a window of cortex does not.

    Args:
        keys: denoised scans ``(C, *S)``.
        image_key: the scan that came in, on the same grid and scale, 1 for its brightest tissue.
        levels: of :func:`sspformer.intensity.noise_level`. At or below the first the scan stays as it came in, at or
            above the second the denoised one is taken, in between a mixture.

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
        """Share of the denoised scan in the result, 0 to 1: ``(C, 1, ...)`` for a scan ``(C, *S)``."""
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
