"""k-space of MRI images: the one place that knows Fourier conventions and physical frequency.

Conventions (docs/method.md):

- Images are batches ``(B, C, *S)`` with two or three spatial sides ``S``. Transforms run over the spatial axes only,
  with ``norm="ortho"``, so that they keep energy (Parseval).
- k-space is kept in the FFT's own order, zero frequency at index 0. :func:`phase_encode_line` gives the order in which
  a scanner reads it.
- Frequencies are in cycles per millimetre. The radial frequency ``rho`` is ``|f|`` over the highest frequency that the
  grid can hold: its corner, where every axis is at its Nyquist frequency. So ``rho`` lies in [0, 1], whatever the voxel
  shape, and equal ``rho`` means equal detail in mm along every axis, also in thick slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor

__all__ = [
    "as_spacing",
    "axis_frequency",
    "data_consistency",
    "filter_image",
    "fourier_resample",
    "highpass",
    "magnitude",
    "phase_encode_line",
    "radial_frequency",
    "reduce_resolution",
    "spacing_of",
    "spatial_axes",
    "to_image",
    "to_kspace",
]


def spatial_axes(image: Tensor) -> tuple[int, ...]:
    """Axes of the spatial sides of a batch ``(B, C, *S)``, as negative numbers; raises on anything but 2D and 3D."""
    spatial_dims = image.ndim - 2
    if spatial_dims not in (2, 3):
        raise ValueError(
            f"expected a batch of shape (B, C, H, W) or (B, C, H, W, D), got shape {tuple(image.shape)}: "
            "add the batch or channel axis with unsqueeze(0)."
        )
    return tuple(range(-spatial_dims, 0))


def to_kspace(image: Tensor) -> Tensor:
    """Fourier transform over the spatial axes of ``(B, C, *S)``, real or complex; complex, zero frequency first."""
    # the complex-to-complex transform is several times faster on the CPU than PyTorch's full transform of a real input
    return torch.fft.fftn(image.to(torch.complex64), dim=spatial_axes(image), norm="ortho")


def to_image(kspace: Tensor) -> Tensor:
    """Inverse of :func:`to_kspace`: the complex image ``(B, C, *S)``."""
    return torch.fft.ifftn(kspace, dim=spatial_axes(kspace), norm="ortho")


def magnitude(image: Tensor) -> Tensor:
    """``|x|`` of a complex image, as a real one."""
    # abs() guards against overflow beyond 1e19, which no image needs, at about three times the time on the CPU
    return image.real.square().addcmul_(image.imag, image.imag).sqrt_()


def as_spacing(spacing: Sequence[float] | Tensor | None, image: Tensor) -> Tensor:
    """Voxel spacing in mm as ``(B, len(S))`` on the image's device.

    Args:
        spacing: mm for each spatial axis, one row for all samples or one a sample; None: 1 mm.
        image: the batch ``(B, C, *S)`` that it belongs to.

    Raises:
        ValueError: if the shape does not fit. (Values are checked where they are read, not here: a check would make
            the host wait for the device.)
    """
    batch_size, spatial_dims = image.shape[0], len(spatial_axes(image))
    if spacing is None:
        return torch.ones(batch_size, spatial_dims, device=image.device)
    spacing = torch.as_tensor(spacing, dtype=torch.float32, device=image.device)
    if spacing.shape not in ((spatial_dims,), (1, spatial_dims), (batch_size, spatial_dims)):
        raise ValueError(
            f"spacing has shape {tuple(spacing.shape)}; for an image of shape {tuple(image.shape)} it must be "
            f"({spatial_dims},) or ({batch_size}, {spatial_dims}), in mm."
        )
    return spacing.expand(batch_size, spatial_dims)


def spacing_of(image: Tensor) -> Tensor | None:
    """Voxel spacing in mm of a channel-first MetaTensor, from its affine; None of a plain tensor.

    Args:
        image: one image ``(C, *S)``, or a batch ``(B, C, *S)`` as MONAI's loaders collate it.

    Returns:
        ``(len(S),)``, or ``(B, len(S))`` for a batch, float32.
    """
    if not isinstance(image, MetaTensor):
        return None
    spatial_dims = image.ndim - (2 if image.is_batch else 1)
    rotation = image.affine[..., :-1, :-1].to(torch.float32)
    return rotation.square().sum(dim=-2).sqrt()[..., :spatial_dims]


def axis_frequency(image: Tensor, spacing: Sequence[float] | Tensor | None, axis: int, half: bool = False) -> Tensor:
    """Frequency along one spatial axis in cycles per mm, ``(B, n)`` shaped to broadcast against ``(B, C, *S)``.

    Args:
        image: the batch ``(B, C, *S)``; only its shape and device matter.
        spacing: see :func:`as_spacing`.
        axis: which of the spatial axes, 0-based.
        half: only the non-negative half, as the real transform keeps it along its last axis.
    """
    spacing = as_spacing(spacing, image)
    n = image.shape[2 + axis]
    cycles = (torch.fft.rfftfreq if half else torch.fft.fftfreq)(n, device=image.device)  # per voxel
    shape = [image.shape[0]] + [1] * (image.ndim - 1)
    shape[2 + axis] = cycles.numel()
    return (cycles / spacing[:, axis, None]).reshape(shape)


def radial_frequency(image: Tensor, spacing: Sequence[float] | Tensor | None = None, half: bool = False) -> Tensor:
    """``rho(f) = |f| / f_max`` in [0, 1], shaped ``(B, 1, *S)``, with ``f_max`` at the corner of the grid.

    An axis of one voxel holds no frequency and does not count towards ``f_max``.

    Args:
        image: the batch ``(B, C, *S)``; only its shape and device matter.
        spacing: voxel spacing in mm, see :func:`as_spacing`.
        half: the last axis as :func:`torch.fft.rfftn` keeps it.
    """
    spacing = as_spacing(spacing, image)
    n_axes = len(spatial_axes(image))
    nyquist = [0.5 / spacing[:, axis] for axis in range(n_axes) if image.shape[2 + axis] > 1]
    f_max = torch.stack(nyquist).square().sum(dim=0).sqrt() if nyquist else torch.ones_like(spacing[:, 0])
    f_max = f_max.reshape(-1, *[1] * (image.ndim - 1))
    total = torch.zeros((), device=image.device)
    for axis in range(n_axes):
        frequency = axis_frequency(image, spacing, axis, half=half and axis == n_axes - 1)
        total = total + (frequency / f_max).square()
    return total.sqrt()


def highpass(rho: Tensor, gamma: float = 1.0) -> Tensor:
    """High-pass weight ``W = rho ** gamma`` of the radial frequency: 0 at zero frequency, rising to 1.

    Args:
        rho: radial frequency in [0, 1], see :func:`radial_frequency`.
        gamma: above 0.

    Raises:
        ValueError: if ``gamma`` is not above 0.
    """
    if gamma <= 0:
        raise ValueError(f"gamma of the high-pass must be above 0, got {gamma}.")
    return rho if gamma == 1 else rho**gamma


def filter_image(image: Tensor, weight: Tensor) -> Tensor:
    """Weigh the k-space of a real image ``(B, C, *S)`` by a real ``weight`` on the half grid; returns a real image."""
    axes = spatial_axes(image)
    half = torch.fft.rfftn(image, dim=axes, norm="ortho")
    return torch.fft.irfftn(half.mul_(weight), s=image.shape[2:], dim=axes, norm="ortho")


def phase_encode_line(n_lines: int, device: torch.device | str | None = None) -> Tensor:
    """Which line is read when: for each index of :func:`to_kspace`'s order, its place in the scan, ``(n_lines,)``.

    Lines are read in order of frequency, from the most negative one to the most positive (a linear ordering).
    """
    return (torch.arange(n_lines, device=device) + n_lines // 2) % n_lines


def fourier_resample(image: Tensor, size: Sequence[int]) -> Tensor:
    """A real image on a finer or coarser grid over the same field of view, by padding or cropping its k-space.

    This is sinc interpolation, exact for all frequencies that both grids can hold. Voxel 0 keeps its place, so the new
    affine is ``affine @ diag(n / n')`` for ``n`` voxels before and ``n'`` after. On the way up the term at the Nyquist
    frequency of an even side is split in halves, which fold on the way down: down after up is the identity, as in
    ``scipy.signal.resample``. Intensities keep their scale; beside sharp edges the image rings.

    Args:
        image: real ``(B, C, *S)``.
        size: voxels along each spatial axis afterwards, 1 or more.

    Returns:
        ``(B, C, *size)``, float32.

    Raises:
        ValueError: if ``size`` has another number of sides than the image, or one below 1.
    """
    axes, image = spatial_axes(image), image.float()
    if len(size) != len(axes) or min(size) < 1:
        raise ValueError(
            f"size must be {len(axes)} sides of 1 or more for an image of shape {tuple(image.shape)}, got {list(size)}."
        )
    for axis, after in sorted(zip(axes, size), key=lambda pair: pair[1] / image.shape[pair[0]]):  # shrink first
        before = image.shape[axis]
        if after == before:
            continue
        lines = min(before, after)
        half = torch.fft.rfft(image, dim=axis).narrow(axis, 0, lines // 2 + 1) * (after / before)
        if lines % 2 == 0:
            half.narrow(axis, lines // 2, 1).mul_(2 if after < before else 0.5)
        image = torch.fft.irfft(half, n=after, dim=axis)
    return image


def reduce_resolution(image: Tensor, factors: Sequence[float] | Tensor) -> Tensor:
    """The image as an acquisition with fewer k-space lines shows it, zero-filled to the same grid.

    Along an axis of ``n`` voxels ``round(n / factor)`` lines are kept, at least one. The result is that of
    :func:`fourier_resample` down to that many voxels and up again, but each sample of a batch has a factor of its own,
    and nothing waits for the device.

    Args:
        image: real ``(B, C, *S)``.
        factors: voxel size of the acquisition over that of the grid, for each axis; ``(len(S),)`` or
            ``(B, len(S))``, 1 or more.

    Returns:
        ``(B, C, *S)``, float32. Beside sharp edges it rings, also below 0.

    Raises:
        ValueError: if the shape of ``factors`` does not fit.
    """
    axes, image = spatial_axes(image), image.float()
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


def data_consistency(
    pred: Tensor, measured: Tensor, factors: Sequence[float] | Tensor | None = None, margin: int = 0
) -> Tensor:
    r"""``pred`` with the part of its k-space that was measured put back exactly; the rest as predicted.

    .. math:: pred + P (measured - pred)

    with the projection ``P`` onto the k-space lines that were read. What was measured without noise is true, so over a
    whole scan this can only lower the squared error.

    Args:
        pred: ``(B, C, *S)``.
        measured: either on a grid of its own over the same field of view, ``(B, C, *s)``, no side longer than that of
            ``pred``; the difference is then taken on that grid. Or zero-filled to the grid of ``pred`` by
            :func:`reduce_resolution`, with its ``factors``.
        factors: see :func:`reduce_resolution`; None: ``measured`` is on its own grid.
        margin: voxels that were cut off each end after :func:`reduce_resolution`; nothing is predicted there.

    Raises:
        ValueError: if a side of ``measured`` is longer than that of ``pred``.
    """
    if any(coarse > fine for coarse, fine in zip(measured.shape[2:], pred.shape[2:])):
        raise ValueError(
            f"what was measured has sides {tuple(measured.shape[2:])} and pred {tuple(pred.shape[2:])}: no side of it "
            "may be the longer."
        )
    if factors is None:
        missing = measured - fourier_resample(pred, measured.shape[2:])
        return pred + fourier_resample(missing, pred.shape[2:])
    missing = F.pad(measured - pred.float(), [margin] * 2 * (pred.ndim - 2))
    inner = (..., *(slice(margin, side - margin) for side in missing.shape[2:]))
    return pred + reduce_resolution(missing, factors)[inner]
