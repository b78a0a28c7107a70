"""Random augmentation of a whole batch on its device, for :class:`sspformer.data.DeviceLoader`.

Each is a callable ``(batch, generator) -> batch``. A batch has images ``(B, 1, *S)``, float32, perhaps labels of the
same shape, and their ``spacing`` (B, len(S)), mm. Every sample draws for itself whether it is changed, and how; shapes
never depend on a draw, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import Randomizable
from torch import Tensor

from .noise import NoiseSampler, checked_range
from .resolution import ResolutionSampler, reduce_resolution


def _chosen(prob: float, image: Tensor, generator: torch.Generator | None) -> Tensor:
    """Which samples of a batch ``(B, ...)`` are changed, bool, to broadcast over them."""
    draw = torch.rand(image.shape[0], generator=generator, device=image.device)
    return (draw < prob).reshape(-1, *[1] * (image.ndim - 1))


def _uniform(bounds: tuple[float, float], shape: Sequence[int], image: Tensor, generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(*shape, generator=generator, device=image.device)


class _Batched:
    def __init__(self, prob: float, key: str) -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f"prob must be between 0 and 1, got {prob}.")
        self.prob, self.key = prob, key


class BatchedContrast(_Batched):
    """Raise the intensities to a power, as MONAI's ``RandAdjustContrast``; each image keeps its least and greatest.

    Args:
        prob: share of the images that are changed.
        gamma: the power, ``(low, high)`` or one number, above 0.
        key: entry of the batch.
    """

    def __init__(self, prob: float = 0.5, gamma: float | Sequence[float] = (0.7, 1.5), key: str = "image") -> None:
        super().__init__(prob, key)
        self.gamma = checked_range("gamma", gamma, 1e-3, 1e3)

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        image = batch[self.key]
        dims = tuple(range(1, image.ndim))
        gamma = _uniform(self.gamma, (image.shape[0], *[1] * len(dims)), image, generator)
        gamma = torch.where(_chosen(self.prob, image, generator), gamma, 1.0)
        low, high = image.amin(dims, keepdim=True), image.amax(dims, keepdim=True)
        width = (high - low).clamp_min(1e-7)
        return {**batch, self.key: ((image - low) / width).clamp(0, 1).pow(gamma) * width + low}


class BatchedBiasField(_Batched):
    """Multiply by a smooth field, as MONAI's ``RandBiasField``: the exponential of a sum of Legendre polynomials.

    Args:
        prob: share of the images that are changed.
        degree: of the polynomials, all of which add up to at most that, 1 or more.
        coeff_range: of their coefficients, ``(low, high)``.
        key: entry of the batch.
    """

    def __init__(
        self, prob: float = 0.3, degree: int = 3, coeff_range: Sequence[float] = (-0.1, 0.1), key: str = "image"
    ) -> None:
        super().__init__(prob, key)
        if degree < 1:
            raise ValueError(f"degree must be 1 or more, got {degree}.")
        self.degree, self.coeff_range = degree, checked_range("coeff_range", coeff_range, -10, 10)
        self._basis: dict[tuple, list[Tensor]] = {}

    def basis(self, image: Tensor) -> list[Tensor]:
        """Legendre polynomials along each axis, ``(degree + 1, side)``, made once for each shape and device."""
        where = (*image.shape[2:], image.device)
        if where not in self._basis:
            rows = [np.polynomial.legendre.legvander(np.linspace(-1, 1, n), self.degree).T for n in image.shape[2:]]
            self._basis[where] = [torch.from_numpy(row).float().to(image.device) for row in rows]
        return self._basis[where]

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        image = batch[self.key]
        basis, n_axes = self.basis(image), image.ndim - 2
        field = _uniform(self.coeff_range, (image.shape[0], *[self.degree + 1] * n_axes), image, generator)
        orders = torch.arange(self.degree + 1, device=image.device)
        total = sum(orders.reshape(-1, *[1] * axis) for axis in range(n_axes))
        field = field * (total <= self.degree)
        for row in basis:  # one axis of coefficients after the other becomes an axis of voxels
            field = torch.tensordot(field, row, dims=([1], [0]))
        field = torch.where(_chosen(self.prob, image, generator), field[:, None].exp(), 1.0)
        return {**batch, self.key: image * field}


class BatchedResolution(_Batched):
    """Lower resolution on the same grid, see :func:`sspformer.transforms.reduce_resolution`; ringing below 0 is cut.

    Args:
        prob: share of the images that are changed.
        factor: see :class:`sspformer.transforms.ResolutionSampler`.
        key: entry of the batch.
    """

    def __init__(self, prob: float = 0.25, factor: float | Sequence[float] = (1.0, 3.0), key: str = "image") -> None:
        super().__init__(prob, key)
        self.sampler = ResolutionSampler(factor)

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        image = batch[self.key]
        factors = torch.where(
            _chosen(self.prob, image, generator).flatten(1), self.sampler.factors(image, generator), 1.0
        )
        return {**batch, self.key: reduce_resolution(image, factors).clamp_min(0)}


class BatchedDownsampling(_Batched):
    """Crops on a coarser grid: k-space is cropped and the voxels grow, each sample by a factor of its own.

    The noise of a scan falls with the square root of the voxel volume, while the anatomy stays real: such a crop is
    cleaner than the scan, and has more structure in each voxel. The Fourier transforms of all lengths are products with
    Dirichlet kernels, so one launch an axis serves the whole batch. A few voxels at each end, where the transform wraps
    around, are cut off.

    Args:
        crop_size: sides of the crops afterwards.
        factor: voxel size afterwards over that before, ``(low, high)`` or one number, 1 or more.
        prob: share of the images that are changed; the others are cut to their middle.
        max_spacing: mm; axes with coarser voxels keep them.
        key: entry of the batch, of ``window`` voxels along each axis.

    Attributes:
        window: sides that the crops must have before.
    """

    WRAP = 4  # voxels at each end of the coarser grid, where the transform wraps around

    def __init__(
        self,
        crop_size: Sequence[int],
        factor: float | Sequence[float] = (1.0, 2.0),
        prob: float = 1.0,
        max_spacing: float = 1.5,
        key: str = "image",
    ) -> None:
        super().__init__(prob, key)
        self.crop_size, self.max_spacing = tuple(crop_size), max_spacing
        self.factor = checked_range("factor", factor, 1, math.inf)
        wrap = 2 * self.WRAP if self.factor[1] > 1 else 0
        self.window = tuple(math.ceil((side + wrap) * self.factor[1]) for side in crop_size)

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        image, spacing, affine = batch[self.key], batch["spacing"], batch["affine"].clone()
        if tuple(image.shape[2:]) != self.window:
            raise ValueError(
                f"images must have {self.window} voxels to become {self.crop_size}, got {image.shape[2:]}."
            )
        factor = _uniform(self.factor, (image.shape[0], 1), image, generator)
        chosen = _chosen(self.prob, image, generator).flatten(1) & (spacing <= self.max_spacing)
        factor = torch.where(chosen, factor, 1.0)
        image, steps, starts = image[:, 0], [], []
        for axis, (size, window) in enumerate(zip(self.crop_size, self.window)):
            f = factor[:, axis]
            coarser = f > 1
            before = torch.where(coarser, ((size + 2 * self.WRAP) * f).round(), float(size))
            after = (before / f).round()
            step = before / after
            start = ((window - before) / 2).floor() + ((after - size) / 2).floor() * step
            kernel = _dirichlet(size, window, before, after, start)
            image = torch.einsum("bij,bj...->bi...", kernel, image.movedim(axis + 1, 1)).movedim(1, axis + 1)
            steps.append(step)
            starts.append(start)
        n_axes = len(steps)
        affine[:, :3, 3:] += affine[:, :3, :n_axes] @ torch.stack(starts, dim=1)[..., None]
        affine[:, :3, :n_axes] *= torch.stack(steps, dim=1)[:, None]
        return {**batch, self.key: image[:, None], "affine": affine, "spacing": spacing * torch.stack(steps, dim=1)}


def _dirichlet(size: int, window: int, before: Tensor, after: Tensor, start: Tensor) -> Tensor:
    """Kernels ``(B, size, window)`` that resample ``before`` voxels in the middle of a window to ``after`` ones, of
    which those from ``start`` on are kept; all three ``(B,)``, in voxels."""
    device = before.device
    first = ((window - before) / 2).floor()[:, None]
    voxel = torch.arange(window, device=device)[None]
    to = start[:, None] + (before / after)[:, None] * torch.arange(size, device=device)  # in voxels of the window
    distance = to[:, :, None] - voxel[:, None]
    terms = (2 * (after / 2).floor() + 1)[:, None, None]
    angle = math.pi * distance / before[:, None, None]
    sine = angle.sin()
    at_centre = sine.abs() < 1e-6
    value = (terms * angle).sin() / torch.where(at_centre, 1.0, sine)
    kernel = torch.where(at_centre, terms, value) / before[:, None, None]
    kernel = torch.where((before > after)[:, None, None], kernel, (distance.abs() < 0.5).float())
    return kernel * ((voxel >= first) & (voxel < first + before[:, None]))[:, None]


class BatchedNoise(_Batched, Randomizable):
    """Frequency-weighted FFT noise, see :class:`sspformer.transforms.NoiseSampler`.

    Args:
        prob: share of the images that are changed.
        key: entry of the batch.
        kwargs: of ``NoiseSampler``.
    """

    def __init__(self, prob: float = 0.15, key: str = "image", **kwargs) -> None:
        super().__init__(prob, key)
        self.sampler = NoiseSampler(**kwargs)

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        image = batch[self.key]
        noisy = self.sampler(image, batch.get("spacing"), generator, self.R)
        return {**batch, self.key: torch.where(_chosen(self.prob, image, generator), noisy, image)}


class BatchedSkullStrip(_Batched):
    """Set images to 0 outside their labelled structures and a few voxels around them.

    A network that has only seen whole heads takes the black around a stripped brain for anatomy. A crop without labels
    becomes air.

    Args:
        prob: share of the images that are changed.
        margin: most voxels kept around the structures; drawn from 0 to this.
        key: entry of the batch.
        label_key: entry with the labels ``(B, 1, *S)``, 0 for the background.
    """

    def __init__(self, prob: float = 0.25, margin: int = 3, key: str = "image", label_key: str = "label") -> None:
        super().__init__(prob, key)
        if margin < 0:
            raise ValueError(f"margin must be 0 or more, got {margin}.")
        self.margin, self.label_key = margin, label_key

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        image = batch[self.key]
        if self.prob == 0:
            return batch
        margin = _uniform((0, self.margin + 1), (image.shape[0], *[1] * (image.ndim - 1)), image, generator).floor()
        brain = (batch[self.label_key] > 0).to(image.dtype)
        for step in range(self.margin):
            brain = torch.where(margin > step, _grown(brain), brain)
        stripped = torch.where(_chosen(self.prob, image, generator), brain, 1.0)
        return {**batch, self.key: image * stripped}


def _grown(mask: Tensor) -> Tensor:
    """A mask ``(B, 1, *S)`` and all voxels beside it, along one axis after the other."""
    pool = F.max_pool3d if mask.ndim == 5 else F.max_pool2d
    for axis in range(mask.ndim - 2):
        width = [3 if axis == other else 1 for other in range(mask.ndim - 2)]
        mask = pool(mask, width, stride=1, padding=[side // 2 for side in width])
    return mask
