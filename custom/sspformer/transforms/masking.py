"""Masks. Inverse frequency projection masking hides patches where high-frequency anatomy sits (docs/method.md).

A mask strategy is any callable ``(image, spacing, generator) -> MaskIndices``: ``image``, clean images ``(B, C, *S)``;
``spacing``, mm, ``(B, len(S))``; ``generator``, on the image's device. Ours is :class:`InverseFrequencyMask`.

Its steps: :func:`high_frequency_map` weighs k-space by a high-pass and projects it back, :func:`patch_energy` pools the
map over the token grid, :func:`draw_mask` draws the patches. :func:`inverse_frequency_mask` does all three for a batch,
:class:`RandInverseFrequencyMask` and :class:`RandInverseFrequencyMaskd` for one scan.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.config.type_definitions import NdarrayOrTensor
from monai.utils import ensure_tuple_rep
from torch import Tensor

from .. import kspace
from ..options import flag
from .seeded import SeededTransform, SeededTransformd


class MaskIndices(NamedTuple):
    """Which tokens are visible and which are masked; every token is in exactly one of the two, in ascending order.

    Attributes:
        keep: visible tokens, ``(B, N - M)``, int64.
        mask: masked tokens, ``(B, M)``, int64, ``M = round(ratio * N)``.
    """

    keep: Tensor
    mask: Tensor

    def to_map(self) -> Tensor:
        """True where masked, ``(B, N)``."""
        shape = (self.keep.shape[0], self.keep.shape[1] + self.mask.shape[1])
        return torch.zeros(shape, dtype=torch.bool, device=self.mask.device).scatter_(1, self.mask, True)


def voxel_mask(indices: MaskIndices, image_size: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """The mask on the image grid, ``(B, 1, *S)``, bool, True where masked."""
    grid = [-(-side // patch) for side, patch in zip(image_size, patch_size, strict=True)]
    mask = indices.to_map().reshape(-1, 1, *grid)
    for axis, patch in enumerate(patch_size):
        mask = mask.repeat_interleave(patch, dim=2 + axis)
    return mask[(..., *(slice(0, side) for side in image_size))]


def high_frequency_map(
    image: Tensor, spacing: Sequence[float] | Tensor | None = None, gamma: float = 1.0, margin: int = 4
) -> Tensor:
    """Steps 1 and 2: where high-frequency content sits, ``h = |F^-1(W F(x))|`` averaged over channels.

    The image is first mirrored by ``margin`` voxels at its borders. A crop, unlike a whole field of view, does not end
    in air: the Fourier transform would see a jump from one border to the opposite one, stronger than any anatomy.

    Args:
        image: clean images ``(B, C, *S)``; not the noisy ones, or noisy air looks like anatomy.
        spacing: voxel spacing in mm, see :func:`sspformer.kspace.as_spacing`.
        gamma: see :func:`sspformer.kspace.highpass`.
        margin: voxels to mirror at each border, 0 or more; less where a side is shorter.

    Returns:
        The map ``(B, 1, *S)``, not negative. Adding a constant to the image does not change it.
    """
    dims = tuple(range(1, image.ndim))
    image = image.float()
    image = image - image.mean(dim=dims, keepdim=True)  # W(0) = 0 removes it anyway, but it costs precision until then
    pad = [min(margin, side - 1) for side in image.shape[2:]]
    padded = F.pad(image, [p for side in reversed(pad) for p in (side, side)], mode="reflect") if any(pad) else image
    weight = kspace.highpass(kspace.radial_frequency(padded, spacing, half=True), gamma)
    detail = kspace.filter_image(padded, weight).abs_()
    detail = detail if image.shape[1] == 1 else detail.mean(dim=1, keepdim=True)
    return detail[(..., *(slice(p, p + side) for p, side in zip(pad, image.shape[2:])))]


def patch_energy(
    image: Tensor,
    patch_size: Sequence[int],
    spacing: Sequence[float] | Tensor | None = None,
    gamma: float = 1.0,
    foreground_share: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Step 3: standardised log energy of the high-frequency map in each patch, and which patches are foreground.

    A voxel is foreground if it is brighter than the mean of its image, as is common for MRI (TorchIO's
    ``ZNormalization.mean``). A patch is, if at least ``foreground_share`` of its voxels are. Neither scaling the image
    nor adding a constant changes anything.

    Args:
        image: clean images ``(B, C, *S)``.
        patch_size: voxels along each spatial axis; the token grid has ``ceil(S / patch_size)`` patches.
        spacing: voxel spacing in mm.
        gamma: see :func:`sspformer.kspace.highpass`.
        foreground_share: between 0 and 1.

    Returns:
        ``z`` (B, N): the log energy, mean 0 and standard deviation 1 over the foreground patches, 0 everywhere for a
        flat image; ``foreground`` (B, N), bool.
    """
    image = image.float()
    dims = tuple(range(1, image.ndim))
    squared = high_frequency_map(image, spacing, gamma).square()
    energy = _pool(squared, patch_size)

    mean_image = image.mean(dim=1, keepdim=True)
    above_mean = (mean_image > mean_image.mean(dim=dims, keepdim=True)).float()
    foreground = _pool(above_mean, patch_size) >= foreground_share

    mean_energy = energy.mean(dim=1, keepdim=True)
    log_energy = (energy / mean_energy.clamp_min(1e-30) + 1e-6).log()
    count = foreground.sum(dim=1, keepdim=True).clamp_min(1)
    mean = (log_energy * foreground).sum(dim=1, keepdim=True) / count
    variance = ((log_energy - mean).square() * foreground).sum(dim=1, keepdim=True) / count
    z = (log_energy - mean) * variance.clamp_min(1e-12).rsqrt()
    # rounding alone leaves a relative detail of about 1e-7 in a flat image: that is no anatomy
    largest = image.abs().amax(dim=dims, keepdim=True).flatten(1)
    flat = squared.mean(dim=dims, keepdim=True).flatten(1) <= (1e-6 * largest).square()
    return torch.where(flat | (variance < 1e-12), torch.zeros_like(z), z), foreground


def _pool(volume: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Mean of ``(B, 1, *S)`` over each patch, ``(B, N)``; a patch at the end of an axis may be cut off."""
    pool = F.avg_pool2d if volume.ndim == 4 else F.avg_pool3d
    return pool(volume, tuple(patch_size), ceil_mode=True).flatten(1)


def draw_mask(
    z: Tensor,
    ratio: float,
    beta: Tensor | float,
    foreground: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskIndices:
    """Steps 4 to 6: draw exactly ``round(ratio * N)`` patches of each sample without replacement.

    Gumbel top-k: the k largest of ``beta * z`` plus standard Gumbel noise are k draws without replacement with weights
    ``exp(beta * z)``. ``beta = 0`` is the uniform mask of a plain masked autoencoder.

    Args:
        z: standardised log energy ``(B, N)``.
        ratio: share of patches to mask, between 0 and 1; at least one patch stays visible and one is masked.
        beta: preference for high-frequency patches, a number or ``(B,)``.
        foreground: ``(B, N)`` bool. Foreground and background are strata, masked at the same ratio each, so that air
            does not fill the visible set. None: one stratum.
        generator: source of the draw, on the device of ``z``.

    Raises:
        ValueError: if ``ratio`` is out of its range, or leaves no patch masked or none visible.
    """
    n_tokens = z.shape[1]
    n_mask = round(_checked_ratio(ratio) * n_tokens)
    if not 0 < n_mask < n_tokens:
        raise ValueError(
            f"a mask ratio of {ratio} of {n_tokens} patches leaves none masked or none visible: "
            "take a larger image, smaller patches or another ratio."
        )
    uniform = torch.rand(z.shape, generator=generator, device=z.device)
    gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
    score = (beta.to(z).reshape(-1, 1) if isinstance(beta, Tensor) else beta) * z + gumbel

    order = score.argsort(dim=1, descending=True)
    if foreground is None:
        return _split(order.new_zeros(z.shape, dtype=torch.bool).scatter_(1, order[:, :n_mask], True), n_mask)
    # the best of each stratum: the foreground's share of the masked set, then as many of the background as are left
    n_foreground = foreground.sum(dim=1, keepdim=True)
    from_foreground = (ratio * n_foreground).round().long()
    from_foreground = torch.minimum(from_foreground, n_foreground).clamp_max(n_mask)
    from_foreground = torch.maximum(from_foreground, n_mask - (n_tokens - n_foreground))
    in_foreground = foreground.gather(1, order)
    rank_in_foreground = in_foreground.cumsum(dim=1)
    rank_in_background = (~in_foreground).cumsum(dim=1)
    from_background = n_mask - from_foreground
    taken = torch.where(in_foreground, rank_in_foreground <= from_foreground, rank_in_background <= from_background)
    return _split(torch.zeros_like(taken).scatter_(1, order, taken), n_mask)


def _checked_ratio(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio must be between 0 and 1 (0.75 is usual), got {ratio}.")
    return ratio


def _split(masked: Tensor, n_mask: int) -> MaskIndices:
    """``(B, N)`` bool with ``n_mask`` True in each row -> indices."""
    order = masked.to(torch.uint8).argsort(dim=1, stable=True)
    return MaskIndices(keep=order[:, : masked.shape[1] - n_mask], mask=order[:, masked.shape[1] - n_mask :])


def inverse_frequency_mask(
    image: Tensor,
    patch_size: Sequence[int],
    ratio: float = 0.75,
    beta: Tensor | float = 1.0,
    spacing: Sequence[float] | Tensor | None = None,
    gamma: float = 1.0,
    stratify: bool = True,
    generator: torch.Generator | None = None,
) -> MaskIndices:
    """Inverse frequency projection masking of a batch: all the steps of the method.

    Args:
        image: clean images ``(B, C, *S)``; runs on their device.
        patch_size: voxels along each spatial axis.
        ratio, beta: see :func:`draw_mask`.
        spacing: voxel spacing in mm.
        gamma: see :func:`sspformer.kspace.highpass`.
        stratify: mask foreground and background at the same ratio each.
        generator: source of the draw, on the image's device.
    """
    z, foreground = patch_energy(image, patch_size, spacing, gamma)
    return draw_mask(z, ratio, beta, foreground if stratify else None, generator)


class InverseFrequencyMask:
    """The mask strategy :func:`inverse_frequency_mask` with its settings, which are checked once.

    Args:
        patch_size: voxels along each spatial axis, or one number for all.
        spatial_dims: 2 or 3.
        ratio: share of masked patches, between 0 and 1.
        beta: preference for high-frequency patches, 0 or more; a schedule may set it through :meth:`set_beta`.
        gamma: see :func:`sspformer.kspace.highpass`.
        stratify: mask foreground and background at the same ratio each.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(
        self,
        patch_size: Sequence[int] | int,
        spatial_dims: int = 3,
        ratio: float = 0.75,
        beta: float = 1.0,
        gamma: float = 1.0,
        stratify: bool = True,
    ) -> None:
        self.patch_size = ensure_tuple_rep(patch_size, spatial_dims)
        self.ratio = _checked_ratio(ratio)
        self.set_beta(beta)
        self.gamma = gamma
        kspace.highpass(torch.zeros(()), gamma)  # raises on a wrong one
        self.stratify = flag(stratify)

    def set_beta(self, beta: float) -> None:
        """Set the preference for high-frequency patches; a parameter setter for MONAI's ``ParamSchedulerHandler``."""
        if beta < 0:
            raise ValueError(f"beta must be 0 or more, got {beta}.")
        self.beta = float(beta)

    def __call__(
        self, image: Tensor, spacing: Sequence[float] | Tensor | None = None, generator: torch.Generator | None = None
    ) -> MaskIndices:
        """Masks of clean images ``(B, C, *S)``."""
        return inverse_frequency_mask(
            image, self.patch_size, self.ratio, self.beta, spacing, self.gamma, self.stratify, generator
        )


class RandInverseFrequencyMask(SeededTransform):
    """Voxel mask of one image ``(C, *S)`` by inverse frequency projection.

    Returns a mask ``(1, *S)`` of the image's own grid and affine: 1 where masked, 0 where visible, uint8.

    Args:
        patch_size: voxels along each spatial axis, or one number for all.
        kwargs: further settings of :class:`InverseFrequencyMask`.
    """

    def __init__(self, patch_size: Sequence[int] | int, **kwargs) -> None:
        super().__init__()
        self.patch_size, self.kwargs = patch_size, kwargs

    def apply(self, image: Tensor, spacing: Tensor | None, generator: torch.Generator) -> Tensor:
        strategy = InverseFrequencyMask(self.patch_size, image.ndim - 2, **self.kwargs)
        return voxel_mask(strategy(image, spacing, generator), image.shape[2:], strategy.patch_size).to(torch.uint8)


class RandInverseFrequencyMaskd(SeededTransformd):
    """Dictionary twin of :class:`RandInverseFrequencyMask`: adds ``{key}_{mask_key_postfix}`` beside each image.

    Args:
        keys: images to mask.
        patch_size: voxels along each spatial axis, or one number for all.
        mask_key_postfix: name of the added entry.
        allow_missing_keys: do not raise if a key is missing.
        kwargs: see :class:`RandInverseFrequencyMask`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        patch_size: Sequence[int] | int,
        mask_key_postfix: str = "mask",
        allow_missing_keys: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(keys, RandInverseFrequencyMask(patch_size, **kwargs), allow_missing_keys=allow_missing_keys)
        self.mask_key_postfix = mask_key_postfix

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        masks = {f"{key}_{self.mask_key_postfix}": self.transform(data[key]) for key in self.key_iterator(dict(data))}
        return {**data, **masks}
