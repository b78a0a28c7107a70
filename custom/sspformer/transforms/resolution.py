"""Lower resolution, as a scanner that reads fewer lines of k-space gives it (docs/method.md).

:func:`sspformer.kspace.reduce_resolution` is the pure, batched function; :class:`ResolutionSampler` draws its factors
for a batch, :class:`RandReducedResolution` for one image and :class:`RandReducedResolutiond` for the entries of a
dictionary. The degradation of the denoising task is the noise of :mod:`sspformer.transforms.noise`.

:class:`RandDownsampledCrop` makes the clean images of both tasks: scans have noise of their own, which fewer lines of
k-space on a coarser grid leave behind.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.config.type_definitions import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, SpatialPad
from monai.utils import convert_to_tensor, ensure_tuple_rep
from torch import Tensor

from .. import kspace
from ..geometry import check_resampled_shape
from ..kspace import reduce_resolution
from ..options import is_null
from .noise import checked_range
from .seeded import SeededTransform, SeededTransformd


class ResolutionSampler:
    """Draws factors for each sample of a batch, and applies :func:`reduce_resolution`.

    Args:
        factor: voxel size of the acquisition over that of the grid, at least 1: a number, or a range ``(low, high)``
            from which it is drawn uniformly for each sample.
        patterns: which axes are reduced, drawn for each sample: ``isotropic``, all axes; ``through_plane``, one axis (a
            stack of thick slices); ``in_plane``, all but one.
        axis: slice axis of ``through_plane`` and ``in_plane``, from 0; None: drawn for each sample.

    Attributes:
        drawn: ``factor`` of each sample of the last batch along each axis, ``(B, len(S))``.

    Raises:
        ValueError: if the range is not ascending or starts below 1, or a pattern is unknown.
    """

    PATTERNS = ("isotropic", "through_plane", "in_plane")

    def __init__(
        self,
        factor: float | tuple[float, float] = (1.5, 4.0),
        patterns: Sequence[str] | str = PATTERNS,
        axis: int | None = None,
    ) -> None:
        self.factor = checked_range("factor", factor, 1, math.inf)
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        if not self.patterns or not set(self.patterns) <= set(self.PATTERNS):
            raise ValueError(f"patterns must be some of {self.PATTERNS}, got {patterns!r}.")
        self.axis = axis

    def factors(self, image: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw factors ``(B, len(S))`` for a batch ``(B, C, *S)``, on its device."""
        n, n_axes = image.shape[0], image.ndim - 2
        draw = {"generator": generator, "device": image.device}
        low, high = self.factor
        factor = low + (high - low) * torch.rand(n, 1, **draw)
        axis = torch.randint(n_axes, (n, 1), **draw) if self.axis is None else self.axis
        is_slice_axis = torch.arange(n_axes, device=image.device).expand(n, -1) == axis
        axes_of = {
            "isotropic": torch.ones_like(is_slice_axis),
            "through_plane": is_slice_axis,
            "in_plane": ~is_slice_axis,
        }
        choice = torch.randint(len(self.patterns), (n,), **draw)
        reduced = torch.stack([axes_of[name] for name in self.patterns])[choice, torch.arange(n, device=image.device)]
        return torch.where(reduced, factor, 1.0)

    def __call__(
        self,
        image: Tensor,
        spacing: Sequence[float] | Tensor | None = None,
        generator: torch.Generator | None = None,
        random_state: np.random.RandomState | None = None,
    ) -> Tensor:
        """Images of lower resolution on the same grid, ``(B, C, *S)``.

        Args:
            image: clean images ``(B, C, *S)``.
            spacing: not used; degradations share one signature.
            generator: on the image's device.
            random_state: not used.
        """
        self.drawn = {"factor": self.factors(image, generator)}
        return reduce_resolution(image, self.drawn["factor"])


class RandReducedResolution(SeededTransform):
    """Lower resolution of one image ``(C, *S)``, on the same grid.

    Args:
        prob: probability of applying it.
        kwargs: see :class:`ResolutionSampler`.
    """

    def __init__(self, prob: float = 1.0, **kwargs) -> None:
        super().__init__(prob)
        self.sampler = ResolutionSampler(**kwargs)

    def apply(self, image: Tensor, spacing: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.sampler(image, spacing, generator)


class RandReducedResolutiond(SeededTransformd):
    """Dictionary twin of :class:`RandReducedResolution`; all keys get the same factors.

    Args:
        keys: entries to change.
        prob: probability of applying it, drawn once for all keys.
        allow_missing_keys: do not raise if a key is missing.
        kwargs: see :class:`ResolutionSampler`.
    """

    def __init__(self, keys: KeysCollection, prob: float = 1.0, allow_missing_keys: bool = False, **kwargs) -> None:
        super().__init__(keys, RandReducedResolution(**kwargs), prob, allow_missing_keys, shared=True)


class RandDownsampledCrop(Randomizable):
    """A random crop of one image ``(C, *S)`` on a coarser grid, made by cropping k-space.

    The noise of the scan falls with the square root of the voxel volume, while the anatomy stays real. The crop is
    therefore cleaner than the scan, has more structure in each voxel, and differs for each factor. It is taken a few
    voxels larger and then trimmed, because a Fourier transform wraps around at the ends.

    Args:
        roi_size: voxels of the crop along each axis. A smaller scan is mirrored at its ends.
        factor: voxel size of the crop over that of the scan, at least 1: a number, or a range ``(low, high)`` from
            which it is drawn uniformly.
        prob: share of the crops that become coarser; the others keep the scan's voxels.
        max_spacing: mm; axes with larger voxels keep them. An image without spacing has voxels of 1 mm.
        threshold: intensity above which a voxel is not air.
        foreground: share of such voxels, 0 to 1, that a crop should have; its place is drawn again up to ``TRIES``
            times. Air is learned soon, and would then dominate a loss that weighs all crops alike.

    Raises:
        ValueError: if ``roi_size`` is not above 0 or does not fit the image, the range of factors is not ascending or
            starts below 1, or ``prob`` or ``foreground`` is outside [0, 1].
    """

    WRAP = 4  # voxels of the coarser grid that are trimmed
    TRIES = 8

    def __init__(
        self,
        roi_size: Sequence[int],
        factor: float | tuple[float, float] = (1.0, 2.0),
        prob: float = 1.0,
        max_spacing: float = 1.5,
        threshold: float = 0.1,
        foreground: float = 0.0,
    ) -> None:
        self.roi_size = tuple(int(side) for side in np.atleast_1d(roi_size))
        if min(self.roi_size) < 1:
            raise ValueError(f"roi_size must be above 0 along each axis, got {roi_size}.")
        if not 0 <= prob <= 1 or not 0 <= foreground <= 1:
            raise ValueError(f"prob and foreground must be between 0 and 1, got {prob} and {foreground}.")
        self.factor = checked_range("factor", factor, 1, math.inf)
        self.prob, self.max_spacing = prob, max_spacing
        self.threshold, self.foreground = threshold, foreground

    def randomize(self, data: Tensor) -> None:
        """Draw the factor of each axis and the place of the crop."""
        if data.ndim - 1 != len(self.roi_size):
            raise ValueError(f"roi_size {self.roi_size} does not fit an image of {data.ndim - 1} axes.")
        spacing = kspace.spacing_of(data)
        spacing = np.ones(data.ndim - 1) if spacing is None else spacing.numpy()
        factor = self.R.uniform(*self.factor) if self.R.uniform() < self.prob else 1.0
        self._factors = np.where(spacing <= self.max_spacing, factor, 1.0)
        wrap = np.where(self._factors > 1, self.WRAP, 0)
        sides = np.array(data.shape[1:])
        lengths = np.minimum(sides, np.round((np.array(self.roi_size) + 2 * wrap) * self._factors).astype(int))
        for _ in range(self.TRIES):
            starts = [self.R.randint(room + 1) for room in sides - lengths]
            self._window = [slice(start, start + int(n)) for start, n in zip(starts, lengths)]
            if self.foreground <= 0:
                break
            some = data[(slice(None), *(slice(w.start, w.stop, 2) for w in self._window))]
            if float((some > self.threshold).float().mean()) >= self.foreground:
                break

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> Tensor:
        img = convert_to_tensor(img, track_meta=True)
        if randomize:
            self.randomize(img)
        crop = img.as_subclass(Tensor)[(slice(None), *self._window)].float()  # cached scans have half precision
        inner, size, before, step = [slice(None)], [], [], []
        for length, wanted, factor in zip(crop.shape[1:], self.roi_size, self._factors, strict=True):
            size.append(max(1, round(length / factor)))
            step.append(length / size[-1])
            kept = min(wanted, size[-1])
            first = (size[-1] - kept) // 2
            inner.append(slice(first, first + kept))
            before.append((wanted - kept) // 2)
        crop = kspace.fourier_resample(crop[None], size)[0][tuple(inner)]
        crop = torch.as_tensor(SpatialPad(self.roi_size, mode="symmetric")(crop)).as_subclass(Tensor)
        if not isinstance(img, MetaTensor):
            return crop
        # first voxel of the crop, in voxels of the scan; resampling and mirroring do not move it
        corner = [w.start + (i.start - b) * s for w, i, b, s in zip(self._window, inner[1:], before, step)]
        affine, axes = img.affine.clone(), len(step)  # MONAI's affines are 4 x 4 in 2D, too
        affine[:axes, -1] += affine[:axes, :axes] @ torch.tensor(corner, dtype=affine.dtype)
        affine[:axes, :axes] *= torch.tensor(step, dtype=affine.dtype)
        return MetaTensor(crop, affine=affine)


class RandDownsampledCropd(Randomizable, MapTransform):
    """Dictionary twin of :class:`RandDownsampledCrop`; all keys get the same crop and factor.

    Args:
        keys: entries to crop, on one grid.
        allow_missing_keys: do not raise if a key is missing.
        kwargs: see :class:`RandDownsampledCrop`.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **kwargs) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.transform = RandDownsampledCrop(**kwargs)

    def set_random_state(self, seed=None, state=None) -> RandDownsampledCropd:
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        d = dict(data)
        for i, key in enumerate(self.key_iterator(d)):
            d[key] = self.transform(d[key], randomize=i == 0)
        return d


class FourierResampled(MapTransform):
    """A scan on a finer grid over the same field of view, zero-filled in k-space: the input of super-resolution.

    The affine is updated, and the scan is kept for :class:`DataConsistencyd`. It belongs right after loading, where the
    axes are the file's. There is no inverse, because the result should be on the finer grid.

    Args:
        keys: scans ``(C, X, Y, Z)``, MetaTensors.
        factor: voxels after over voxels before, at least 1: a number, or one for each axis.
        spacing: voxel spacing in mm instead of a factor: a number, or one for each axis. It is rounded so that a whole
            number of voxels fills the field of view. No axis gets coarser.
        low_key: name of the entry that keeps the scan.
        allow_missing_keys: do not raise if a key is missing.

    Raises:
        ValueError: unless exactly one of ``factor`` and ``spacing`` is given, or a number is out of its range. None,
            and "null" from a command line, count as not given. When called: for a grid that does not fit into the
            memory, see :func:`sspformer.geometry.check_resampled_shape`.
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
            option = f"factor {self.factor}" if self.spacing is None else f"target_spacing {self.spacing} mm"
            check_resampled_shape(size, option, low.meta.get("filename_or_obj", "the scan"))
            fine = MetaTensor(
                kspace.fourier_resample(low.as_tensor()[None], size.tolist())[0],
                affine=low.affine @ torch.diag(torch.tensor([*(sides / size), 1.0], dtype=low.affine.dtype)),
                meta={name: value for name, value in low.meta.items() if name != "affine"},
                applied_operations=low.applied_operations,
            )
            d[key], d[self.low_key] = fine, low
        return d

    def size(self, image: MetaTensor) -> np.ndarray:
        """Voxels of the finer grid along each axis."""
        sides = np.array(image.shape[1:])
        if self.spacing is None:
            wanted = sides * np.array(self.factor)
        else:
            wanted = sides * kspace.spacing_of(image).numpy() / np.array(self.spacing)
        return np.maximum(np.round(wanted).astype(int), sides)


def _three_numbers(name: str, value: Sequence[float] | float) -> tuple[float, ...]:
    """A number, or one for each axis, as three numbers; raises ``ValueError`` for anything else."""
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
        low_key: the measured scan on its own grid, with the prediction's orientation and intensity scale.
        enabled: False: leave predictions as they are.
        resampled: whether the scan was measured on a coarser grid.

    Raises:
        ValueError: if it is enabled but the scan was not measured on a coarser grid.
    """

    def __init__(
        self, keys: KeysCollection, low_key: str = "low", enabled: bool = True, resampled: bool = True
    ) -> None:
        super().__init__(keys)
        self.low_key, self.enabled = low_key, enabled
        if enabled and not resampled:
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
