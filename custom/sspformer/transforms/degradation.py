"""Lower resolution, as a scanner that reads fewer lines of k-space gives it (METHOD.md, degradations).

:func:`reduce_resolution` is the pure, batched function; :class:`ResolutionSampler` draws its factors for a batch,
:class:`RandReducedResolution` for one image and :class:`RandReducedResolutiond` for the entries of a dictionary. The
degradation of the denoising task is the noise of :mod:`sspformer.transforms.noise`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.config.type_definitions import NdarrayOrTensor
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch import Tensor

from .. import kspace
from .seeded import SeededTransform, SeededTransformd

__all__ = ["RandReducedResolution", "RandReducedResolutiond", "ResolutionSampler", "reduce_resolution"]


def reduce_resolution(image: Tensor, factors: Sequence[float] | Tensor) -> Tensor:
    """The image as an acquisition with fewer k-space lines shows it, zero-filled to the same grid.

    Along an axis of ``n`` voxels ``round(n / factor)`` lines are kept, at least one. Exactly
    :func:`sspformer.kspace.fourier_resample` down to that many voxels and up again, but for each sample of a batch a
    factor of its own, without waiting for the device.

    Args:
        image: real ``(B, C, *S)``.
        factors: voxel size of the acquisition over that of the grid, for each axis; ``(len(S),)`` or
            ``(B, len(S))``, 1 or more.

    Returns:
        ``(B, C, *S)``, float32. Beside sharp edges it rings, also below 0.

    Raises:
        ValueError: if the shape of ``factors`` does not fit.
    """
    axes, image = kspace.spatial_axes(image), image.float()
    factors = torch.as_tensor(factors, dtype=torch.float32, device=image.device)
    if factors.shape not in ((len(axes),), (image.shape[0], len(axes))):
        raise ValueError(
            f"factors have shape {tuple(factors.shape)}; for an image of shape {tuple(image.shape)} it must be "
            f"({len(axes)},) or ({image.shape[0]}, {len(axes)})."
        )
    for axis, factor in zip(axes, factors.expand(image.shape[0], -1).unbind(dim=1)):
        n = image.shape[axis]
        lines = (n / factor).round().clamp(1, n).reshape(-1, *[1] * (image.ndim - 1))
        half = torch.fft.rfft(image, dim=axis)
        index = torch.arange(half.shape[axis], device=image.device).reshape(-1, *[1] * (-1 - axis))
        # of the two terms at the Nyquist frequency of fewer lines, only the even part survives folding and splitting
        half = torch.complex(half.real * (2 * index <= lines), half.imag * (2 * index < lines))
        image = torch.fft.irfft(half, n=n, dim=axis)
    return image


class ResolutionSampler:
    """Draws the factors of :func:`reduce_resolution` for every sample of a batch, and applies it.

    Args:
        factor: voxel size of the acquisition over that of the grid, ``(low, high)``, drawn uniformly for each sample,
            or one number; 1 or more.
        patterns: which axes have it, drawn for each sample: ``isotropic``, all; ``through_plane``, one (a stack of
            thick slices); ``in_plane``, all but one.
        axis: the slice axis of ``through_plane`` and ``in_plane``, 0-based; None: drawn for each sample.

    Attributes:
        drawn: ``factor`` of each sample of the last batch along each axis, ``(B, len(S))``.

    Raises:
        ValueError: if the range is not ordered or starts below 1, or a pattern is unknown.
    """

    PATTERNS = ("isotropic", "through_plane", "in_plane")

    def __init__(
        self,
        factor: float | tuple[float, float] = (1.5, 4.0),
        patterns: Sequence[str] | str = PATTERNS,
        axis: int | None = None,
    ) -> None:
        self.factor = (factor, factor) if np.isscalar(factor) else tuple(factor)
        if len(self.factor) != 2 or not 1 <= self.factor[0] <= self.factor[1]:
            raise ValueError(f"factor must be a number or (low, high) of 1 or more, got {factor!r}.")
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        if not self.patterns or not set(self.patterns) <= set(self.PATTERNS):
            raise ValueError(f"patterns must be some of {self.PATTERNS}, got {patterns!r}.")
        self.axis = axis

    def factors(self, image: Tensor, generator: torch.Generator | None) -> Tensor:
        """Factors for a batch ``(B, C, *S)``, ``(B, len(S))``, on its device."""
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
            spacing: not needed, the factors are relative; here so that it is called as the noise is.
            generator: on the image's device.
            random_state: not needed, as ``spacing``.
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

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> Tensor:
        img = convert_to_tensor(img, track_meta=True, dtype=torch.float32)
        if randomize:
            self.randomize()
        if not self._do_transform:
            return img
        reduced = self.sampler(img.as_subclass(Tensor)[None], generator=self.generator(img.device))[0]
        return convert_to_dst_type(reduced, img)[0]


class RandReducedResolutiond(SeededTransformd):
    """Dictionary twin of :class:`RandReducedResolution`; all keys get the same factors.

    Args:
        keys: entries to change.
        prob: probability of applying it, drawn once for all keys.
        allow_missing_keys: do not raise if a key is missing.
        kwargs: see :class:`ResolutionSampler`.
    """

    def __init__(self, keys: KeysCollection, prob: float = 1.0, allow_missing_keys: bool = False, **kwargs) -> None:
        super().__init__(keys, RandReducedResolution(prob=1.0, **kwargs), prob, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        d = dict(data)
        self.randomize(None)
        self.transform.randomize()
        for key in self.key_iterator(d):
            untouched = convert_to_tensor(d[key], track_meta=True, dtype=torch.float32)
            d[key] = self.transform(untouched, randomize=False) if self._do_transform else untouched
        return d
