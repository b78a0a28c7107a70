"""Lower resolution, as a scanner that reads fewer lines of k-space gives it (docs/method.md).

:func:`sspformer.kspace.reduce_resolution` is the pure, batched function; :class:`ResolutionSampler` draws its factors
for a batch, :class:`RandReducedResolution` for one image and :class:`RandReducedResolutiond` for the entries of a
dictionary. The degradation of the denoising task is the noise of :mod:`sspformer.transforms.noise`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep
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
