"""What super-resolution and denoising need of MONAI's engines: pairs of a clean image and its degraded one, made on the
device; intensities scaled so that they can be brought back; the loss; the finer grid; the k-space that was measured."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import ensure_tuple_rep, str2bool
from torch import Tensor, nn

from . import kspace
from .files import is_null
from .networks.dense import noise_level
from .pretraining import PrepareBatchOnDevice
from .transforms.degradation import reduce_resolution

__all__ = [
    "DataConsistencyd",
    "FourierResampled",
    "LeaveQuietd",
    "PrepareDegradedBatch",
    "RestorationLoss",
    "ScaleByPercentiled",
    "keep_measured",
    "unpack_targets",
]


class PrepareDegradedBatch(PrepareBatchOnDevice):
    """Degrades a batch of clean images on the device: MONAI's ``prepare_batch`` of the restoration tasks.

    Fourier transforms wrap around at the border of a crop, where a scan goes on. So crops come with a margin, which is
    degraded with them and then cut off.

    Args:
        degradation: called as ``degradation(image, spacing, generator, random_state)``, as
            :class:`sspformer.transforms.NoiseSampler` and :class:`sspformer.transforms.ResolutionSampler` are.
        margin: voxels at each end of each spatial axis; 0 for whole scans.
        image_key: entry of the batch, ``(B, C, *S)``; spacing is read from it if it is a MetaTensor. Values below 0,
            which a magnitude image has none of, become 0.
        seed: of the degradation; :class:`sspformer.handlers.SeedEpoch` sets it anew each epoch.

    Raises:
        ValueError: if ``margin`` is negative, or leaves nothing of a batch.
    """

    def __init__(self, degradation: Any, margin: int = 0, image_key: str = "image", seed: int = 0) -> None:
        if margin < 0:
            raise ValueError(f"margin must be 0 or more, got {margin}.")
        self.degradation, self.margin = degradation, margin
        super().__init__(image_key, seed)

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: torch.device | str, non_blocking: bool = False, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor], tuple, dict]:
        """The four parts that MONAI's engines take: degraded image, targets ``clean`` and ``degraded``, nothing more.

        All are ``(B, C, *S)`` with ``S`` less twice the margin. Of a sampler that draws factors the targets have
        ``factor`` too, ``(B, len(S))``: they say which k-space was measured.
        """
        sides = tuple(batchdata[self.image_key].shape[2:])
        if min(sides) <= 2 * self.margin:
            raise ValueError(
                f"crops of {sides} voxels are used up by a margin of {self.margin} at each end: set crop_size "
                "above 2 * margin."
            )
        clean, spacing, generator = self.load(batchdata, device, non_blocking, **kwargs)
        clean = clean.clamp(min=0)
        degraded = self.degradation(clean, spacing, generator, self.R)
        inner = (..., *(slice(self.margin, side - self.margin) for side in clean.shape[2:]))
        clean, degraded = clean[inner].contiguous(), degraded[inner].contiguous()
        target = {"clean": clean, "degraded": degraded}
        if "factor" in self.drawn:
            target["factor"] = self.drawn["factor"]
        return degraded, target, (), {}

    @property
    def drawn(self) -> Mapping[str, Tensor]:
        """What the samples of the last batch were degraded by: ``sigma`` or ``factor``, as the sampler says."""
        return getattr(self.degradation, "drawn", {})


class RestorationLoss(nn.Module):
    r"""How much of the degradation's error is left, in dB: minus the gain in PSNR, averaged over the batch.

    .. math:: 10 \log_{10} \frac{mse(pred, clean) + \epsilon}{mse(degraded, clean) + \epsilon}

    The plain squared error is ruled by the strongest degradations; here each one counts alike, so that a network blind
    to the level learns not to harm a scan that has hardly any.

    If the target has the ``factor`` of a lower resolution, the prediction is judged after :func:`keep_measured`: the
    network need not find out which k-space was measured, and may write anything there. It is to be used the same way.

    Args:
        eps: mean square that counts as nothing, above 0; 1e-6 is a thousandth of the intensity range.
        margin: that of :class:`PrepareDegradedBatch`, for :func:`keep_measured`.

    Raises:
        ValueError: if ``eps`` is not above 0, or ``margin`` is negative.
    """

    def __init__(self, eps: float = 1e-6, margin: int = 0) -> None:
        super().__init__()
        if eps <= 0:
            raise ValueError(f"eps must be above 0, got {eps}.")
        if margin < 0:
            raise ValueError(f"margin must be 0 or more, got {margin}.")
        self.eps, self.margin = eps, margin

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, from ``pred`` and the target's ``clean`` and ``degraded``, all ``(B, C, *S)``, and its
        ``factor``, ``(B, len(S))``, if it has one."""

        def error(image: Tensor) -> Tensor:
            return (image.float() - target["clean"]).square().flatten(1).mean(dim=1) + self.eps

        if "factor" in target:
            pred = keep_measured(pred, target["degraded"], target["factor"], self.margin)
        return 10 * (error(pred).log10() - error(target["degraded"]).log10()).mean()


def keep_measured(pred: Tensor, degraded: Tensor, factors: Tensor, margin: int = 0) -> Tensor:
    """``pred`` with the k-space that ``degraded`` holds put back, the rest as predicted.

    What was measured without noise is true, so this is an orthogonal projection towards the truth: over a whole scan it
    can only lower the squared error. It is :func:`sspformer.kspace.data_consistency` for a factor of its own for each
    sample, on the grid of the prediction.

    Args:
        pred: ``(B, C, *S)``.
        degraded: ``(B, C, *S)`` of :func:`sspformer.transforms.reduce_resolution`.
        factors: those that it was reduced by, ``(len(S),)`` or ``(B, len(S))``.
        margin: voxels that were cut off each end after it was reduced, in which nothing is predicted.
    """
    residual = F.pad(pred.float() - degraded, [margin] * 2 * (pred.ndim - 2))
    residual = residual - reduce_resolution(residual, factors)
    return degraded + residual[(..., *(slice(margin, side - margin) for side in residual.shape[2:]))]


def unpack_targets(output: Mapping[str, Any], data_consistency: bool = False) -> dict[str, Any]:
    """An engine's output with the ``clean`` and ``degraded`` of its targets beside ``pred``, for metrics and pictures.

    Args:
        output: of a batch, or of one sample of it.
        data_consistency: put the measured k-space back into ``pred``, see :func:`keep_measured`.
    """
    output = {**output, **output["label"]}
    if str2bool(data_consistency):  # the command line gives "false" as a string
        if "factor" not in output:
            raise ValueError("data_consistency is for lost resolution: this degradation leaves no k-space to keep.")
        pred, degraded, factor = (torch.as_tensor(output[key]) for key in ("pred", "degraded", "factor"))
        if factor.ndim == 1:
            output["pred"] = keep_measured(pred[None], degraded[None], factor)[0]
        else:
            output["pred"] = keep_measured(pred, degraded, factor)
    return output


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


class FourierResampled(MapTransform):
    """A scan on a finer grid over the same field of view, zero-filled in k-space: the input of super-resolution.

    The affine follows, and the scan as it was is kept beside it, for :class:`DataConsistencyd`. There is no inverse:
    the finer grid is what is asked for. It belongs right after loading, where axes and voxel 0 are the file's own.

    Args:
        keys: entries to resample, MetaTensors ``(C, X, Y, Z)``.
        factor: voxels after over voxels before, a number or one for each axis, 1 or more.
        spacing: the voxel spacing wanted instead, mm, a number or one for each axis; the nearest that the field of view
            is a whole number of. No axis gets coarser.
        low_key: name of the entry that keeps the scan as it was, appended to the key.
        allow_missing_keys: do not raise if a key is missing.

    Raises:
        ValueError: unless just one of ``factor`` and ``spacing`` is given (None, or a word for it, is not), a number or
            three, each above 0 and no factor below 1.
    """

    def __init__(
        self,
        keys: KeysCollection,
        factor: Sequence[float] | float | None = None,
        spacing: Sequence[float] | float | None = None,
        low_key: str = "low",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if is_null(factor) == is_null(spacing):
            raise ValueError(f"give factor or target_spacing, and null for the other; got {factor} and {spacing}.")
        self.factor = None if is_null(factor) else _three_numbers("factor", factor)
        self.spacing = None if is_null(spacing) else _three_numbers("target_spacing", spacing)
        if self.factor is not None and min(self.factor) < 1:
            raise ValueError(f"factor must be 1 or more along each axis, got {factor}.")
        if self.spacing is not None and min(self.spacing) <= 0:
            raise ValueError(f"target_spacing must be above 0 mm along each axis, got {spacing}.")
        self.low_key = low_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            low: MetaTensor = d[key]
            size, sides = self.size(low), np.array(low.shape[1:])
            fine = MetaTensor(
                kspace.fourier_resample(low.as_tensor()[None], size.tolist())[0],
                affine=low.affine @ torch.diag(torch.tensor([*(sides / size), 1.0], dtype=low.affine.dtype)),
                meta={name: value for name, value in low.meta.items() if name != "affine"},
                applied_operations=low.applied_operations,
            )
            d[key], d[self.low_key] = fine, low
        return d

    def size(self, image: MetaTensor) -> np.ndarray:
        """Voxels along each axis afterwards."""
        sides = np.array(image.shape[1:])
        if self.spacing is None:
            wanted = sides * np.array(self.factor)
        else:
            wanted = sides * kspace.spacing_of(image).numpy() / np.array(self.spacing)
        return np.maximum(np.round(wanted).astype(int), sides)


def _three_numbers(name: str, value: Sequence[float] | float) -> tuple[float, ...]:
    """A number, or one for each axis, as three; raises ``ValueError`` for anything else."""
    try:
        numbers = tuple(float(number) for number in ensure_tuple_rep(value, 3))
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f'{name} must be a number, or three such as "[1,1,2.5]", got {value!r}.')
    return numbers


class DataConsistencyd(MapTransform):
    """Put the measured part of k-space back into predictions, see :func:`sspformer.kspace.data_consistency`.

    Args:
        keys: predictions ``(C, *S)``.
        low_key: the scan as it was measured, on its own grid, with the prediction's orientation and intensity scale.
        enabled: False: leave the predictions as they are.
        resampled: whether the scan was on a coarser grid at all.

    Raises:
        ValueError: if it is enabled for a scan that was not.
    """

    def __init__(
        self, keys: KeysCollection, low_key: str = "low", enabled: bool = True, resampled: bool = True
    ) -> None:
        super().__init__(keys)
        self.low_key = low_key
        self.enabled = str2bool(enabled)  # the command line gives "false" as a string
        if self.enabled and not resampled:
            raise ValueError(
                "data_consistency true is for super-resolution, which keeps the k-space that was measured; other tasks "
                "have none to keep: leave --data_consistency out, or add configs/super_resolution.json."
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d) if self.enabled else ():
            pred = d[key]
            low = torch.as_tensor(d[self.low_key]).as_subclass(Tensor).to(pred.device)
            d[key] = pred.clone()
            d[key][:] = kspace.data_consistency(torch.as_tensor(pred).as_subclass(Tensor)[None], low[None])[0]
        return d


class LeaveQuietd(MapTransform):
    """Where a whole scan has hardly any noise, give it back as it is: noise that weak cannot be told from texture.

    Judged on the whole scan, whose air and white matter show the noise bare; a window of cortex does not.

    Args:
        keys: denoised scans ``(C, *S)``.
        image_key: the scan before, on the same grid and scale, 1 for its brightest tissue.
        levels: of :func:`sspformer.networks.dense.noise_level`. At or below the first the scan is left as it is, at or
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
