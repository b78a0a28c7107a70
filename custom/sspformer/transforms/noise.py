"""Frequency-weighted FFT noise: thermal noise and physiological motion in k-space (docs/method.md).

:func:`frequency_weighted_noise` is the pure, batched function, :class:`NoiseSampler` draws its parameters for a batch.
:class:`RandFrequencyWeightedNoise` and :class:`RandFrequencyWeightedNoised` are MONAI transforms of one scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.config import KeysCollection
from torch import Tensor

from .. import kspace
from ..options import flag
from .seeded import SeededTransform, SeededTransformd


@dataclass
class PhysiologicalMotion:
    """Periodic rigid motion while k-space is read; ``M`` sinusoids (breathing, heartbeat) for each of ``B`` samples.

    Attributes:
        displacement: peak displacement along each spatial axis, mm, ``(B, M, len(S))``; positive towards higher index.
        frequency: Hz, ``(B, M)``; breathing about 0.2 to 0.35, heartbeat about 0.9 to 1.6.
        phase: phase at the first line, rad, ``(B, M)``.
        repetition_time: time between two phase-encode lines, s, ``(B,)``.
        modulation: relative amplitude of the signal's own modulation, ``(B, M)``, 0 to 1.
        axis: the phase-encode axis, a spatial axis (0-based), one for the whole batch.
    """

    displacement: Tensor
    frequency: Tensor
    phase: Tensor
    repetition_time: Tensor
    modulation: Tensor
    axis: int = 0

    def kspace_factor(self, image: Tensor, spacing: Tensor) -> Tensor:
        """The complex factor by which the motion changes k-space, broadcastable to ``(B, 1, *S)``.

        A displacement ``d`` turns the phase of k-space by ``2 pi k . d`` (Fourier shift theorem). Line ``n`` is read at
        ``n * repetition_time``, so ``d`` varies along the phase-encode axis only. The phase of the whole grid is then a
        product of one small table for each axis.
        """
        n_axes, n_lines = image.ndim - 2, image.shape[2 + self.axis]
        time = kspace.phase_encode_line(n_lines, image.device) * self.repetition_time[:, None]  # (B, N)
        wave = torch.sin(2 * math.pi * self.frequency[..., None] * time[:, None] + self.phase[..., None])  # (B, M, N)
        along_lines = [image.shape[0]] + [1] * (image.ndim - 1)
        along_lines[2 + self.axis] = n_lines

        amplitude = 1 + (self.modulation[..., None] * wave).sum(dim=1)
        factor = torch.complex(amplitude, torch.zeros_like(amplitude)).reshape(along_lines)
        for axis in range(n_axes):
            shift = (self.displacement[..., axis, None] * wave).sum(dim=1).reshape(along_lines)  # mm at each line
            angle = 2 * math.pi * kspace.axis_frequency(image, spacing, axis) * shift
            factor = factor * torch.polar(torch.ones_like(angle), -angle)
        return factor


def noise_weight(rho: Tensor, alpha: Tensor | float, eps0: float = 0.1) -> Tensor:
    """``w(rho) ~ (eps0 + rho) ** alpha`` with mean square 1 over the grid of each sample, ``(B, 1, *S)``.

    Args:
        rho: radial frequency ``(B, 1, *S)`` of the full grid.
        alpha: exponent, a number or ``(B,)``. 0: white noise; above 0: more at high frequency.
        eps0: above 0; keeps the weight finite at zero frequency where ``alpha`` is negative.
    """
    if eps0 <= 0:
        raise ValueError(f"eps0 must be above 0, got {eps0}.")
    alpha = torch.as_tensor(alpha, dtype=rho.dtype, device=rho.device).reshape(-1, *[1] * (rho.ndim - 1))
    weight = (eps0 + rho).pow_(alpha)
    return weight.mul_(weight.square().mean(dim=tuple(range(1, rho.ndim)), keepdim=True).rsqrt())


def frequency_weighted_noise(
    image: Tensor,
    sigma: Tensor | float | None,
    alpha: Tensor | float = 0.0,
    spacing: Sequence[float] | Tensor | None = None,
    motion: PhysiologicalMotion | None = None,
    eps0: float = 0.1,
    generator: torch.Generator | None = None,
    intensity_range: float | None = None,
) -> Tensor:
    r"""Magnitude image of a k-space with thermal noise and physiological motion.

    .. math:: x' = | F^{-1}( F(x) m(k) + \sigma w(\rho) \epsilon ) |

    with complex standard normal :math:`\epsilon` (each part of variance 1), the weight ``w`` of :func:`noise_weight`
    and the factor ``m`` of :class:`PhysiologicalMotion`. With ``alpha=0`` the result is exactly Rician.

    Args:
        image: magnitude images ``(B, C, *S)``, not negative: add noise before z-scoring. Runs on its device.
        sigma: standard deviation in the image domain as a fraction of the intensity range, a number or ``(B,)``;
            independent of ``alpha``. None: no thermal noise.
        alpha: exponent of the noise weight, a number or ``(B,)``.
        spacing: voxel spacing in mm, ``(len(S),)`` or ``(B, len(S))``; None: 1 mm.
        motion: physiological motion, or None.
        eps0: see :func:`noise_weight`.
        generator: source of the noise, on the image's device.
        intensity_range: of the whole scan, where the image is a crop of it; None: maximum less minimum of each channel
            of each sample.

    Returns:
        ``(B, C, *S)``, not negative, float32.
    """
    image = image.float()
    spacing = kspace.as_spacing(spacing, image)
    noise = None
    if sigma is not None:
        weight = noise_weight(kspace.radial_frequency(image, spacing), alpha, eps0)
        if intensity_range is None:
            dims = tuple(range(2, image.ndim))
            intensity_range = image.amax(dim=dims, keepdim=True) - image.amin(dim=dims, keepdim=True)  # (B, C, 1...)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=image.device).reshape(-1, *[1] * (image.ndim - 1))
        noise = torch.randn(*image.shape, 2, generator=generator, device=image.device)
        noise = torch.view_as_complex(noise.mul_((weight * (sigma * intensity_range))[..., None]))
    if motion is None:  # the transform is linear: the image itself need not go to k-space
        if noise is None:
            return image.abs()
        noisy = kspace.to_image(noise)
        noisy.real.add_(image)
        return kspace.magnitude(noisy)
    signal = kspace.to_kspace(image).mul_(motion.kspace_factor(image, spacing))
    return kspace.magnitude(kspace.to_image(signal if noise is None else signal.add_(noise)))


def _uniform(bounds: tuple[float, float], *shape: int, generator: torch.Generator | None, device) -> Tensor:
    low, high = bounds
    return torch.rand(*shape, generator=generator, device=device) * (high - low) + low


class NoiseSampler:
    """Draws the parameters of :func:`frequency_weighted_noise` for every sample of a batch, and applies it.

    A range is ``(low, high)``, drawn uniformly for each sample, or one number. A share ``motion_prob`` of each batch
    moves, rounded at random where it is no whole number of samples, so that shapes hardly ever change. Loaders shuffle,
    so the samples that move are the first of the batch; the others cost no Fourier transform. All samples of a batch
    have one phase-encode axis.

    Args:
        sigma: standard deviation of the thermal noise, a fraction of the intensity range.
        alpha: exponent of its frequency weight.
        eps0: see :func:`noise_weight`.
        motion_prob: share of the samples with physiological motion, 0 to 1.
        breathing: peak displacement by breathing (0.2 to 0.35 Hz), mm.
        heartbeat: peak displacement by the heartbeat (0.9 to 1.6 Hz), mm.
        modulation: relative modulation of the signal, 0 to 1; half of it by each of the two.
        repetition_time: time between two phase-encode lines, s.
        intensity_range: see :func:`frequency_weighted_noise`.
        log_sigma: draw the logarithm of ``sigma`` uniformly, so that weak noise is as frequent as strong noise.

    Attributes:
        drawn: ``sigma`` of each sample of the last batch, ``(B,)``.

    Raises:
        ValueError: if a range is not ordered, or goes beyond what is physical.
    """

    BREATHING_HZ = (0.2, 0.35)
    HEARTBEAT_HZ = (0.9, 1.6)

    def __init__(
        self,
        sigma: float | tuple[float, float] = (0.0, 0.1),
        alpha: float | tuple[float, float] = (0.0, 1.0),
        eps0: float = 0.1,
        motion_prob: float = 0.5,
        breathing: float | tuple[float, float] = (0.0, 1.0),
        heartbeat: float | tuple[float, float] = (0.0, 0.3),
        modulation: float | tuple[float, float] = (0.0, 0.1),
        repetition_time: float | tuple[float, float] = (0.3, 2.0),
        intensity_range: float | None = None,
        log_sigma: bool = False,
    ) -> None:
        log_sigma = flag(log_sigma)
        if log_sigma and min(np.atleast_1d(sigma)) <= 0:
            raise ValueError(f"log_sigma needs sigma above 0, got {sigma}.")
        if not 0 <= motion_prob <= 1:
            raise ValueError(f"motion_prob must be in [0, 1], got {motion_prob}.")
        if eps0 <= 0:
            raise ValueError(f"eps0 must be above 0, got {eps0}.")
        self.sigma = checked_range("sigma", sigma, 0, 1)
        self.alpha = checked_range("alpha", alpha, -4, 4)
        self.eps0 = eps0
        self.motion_prob = motion_prob
        self.breathing = checked_range("breathing", breathing, 0, 100)
        self.heartbeat = checked_range("heartbeat", heartbeat, 0, 100)
        self.modulation = checked_range("modulation", modulation, 0, 1)
        self.repetition_time = checked_range("repetition_time", repetition_time, 0, 60)
        self.intensity_range = intensity_range
        self.log_sigma = log_sigma

    def __call__(
        self,
        image: Tensor,
        spacing: Sequence[float] | Tensor | None,
        generator: torch.Generator | None,
        random_state: np.random.RandomState,
    ) -> Tensor:
        """Noisy magnitude images ``(B, C, *S)``.

        Args:
            image: clean magnitude images ``(B, C, *S)``.
            spacing: mm, see :func:`frequency_weighted_noise`.
            generator: on the image's device, for the parameters of each sample.
            random_state: for the axis and the number of samples that move.
        """
        axis = int(random_state.randint(image.ndim - 2))
        n_moving = int(image.shape[0] * self.motion_prob + random_state.uniform())  # in most batches always the same
        spacing = kspace.as_spacing(spacing, image)
        self.drawn = {"sigma": torch.empty(0, device=image.device)}
        parts = [
            self._noisy(image[:n_moving], spacing[:n_moving], generator, axis),
            self._noisy(image[n_moving:], spacing[n_moving:], generator, None),
        ]
        return torch.cat(parts)

    def _noisy(self, image: Tensor, spacing: Tensor, generator: torch.Generator | None, axis: int | None) -> Tensor:
        """Noisy images of one part of a batch, with motion along ``axis`` unless that is None."""
        n, draw = image.shape[0], {"generator": generator, "device": image.device}
        if n == 0:
            return image.float()
        motion = None
        if axis is not None:
            peak = torch.stack([_uniform(self.breathing, n, **draw), _uniform(self.heartbeat, n, **draw)], dim=1)
            direction = torch.randn(n, 2, image.ndim - 2, **draw)
            hertz = [_uniform(self.BREATHING_HZ, n, **draw), _uniform(self.HEARTBEAT_HZ, n, **draw)]
            motion = PhysiologicalMotion(
                displacement=peak[..., None] * torch.nn.functional.normalize(direction, dim=-1),
                frequency=torch.stack(hertz, dim=1),
                phase=_uniform((0, 2 * math.pi), n, 2, **draw),
                repetition_time=_uniform(self.repetition_time, n, **draw),
                modulation=_uniform(self.modulation, n, 2, **draw) / 2,
                axis=axis,
            )
        is_noisy = self.sigma[1] > 0
        sigma = self._draw_sigma(n, **draw) if is_noisy else torch.zeros(n, device=image.device)
        self.drawn["sigma"] = torch.cat([self.drawn["sigma"], sigma])
        return frequency_weighted_noise(
            image,
            sigma=sigma if is_noisy else None,
            alpha=_uniform(self.alpha, n, **draw),
            spacing=spacing,
            motion=motion,
            eps0=self.eps0,
            generator=generator,
            intensity_range=self.intensity_range,
        )

    def _draw_sigma(self, n: int, **draw) -> Tensor:
        if not self.log_sigma:
            return _uniform(self.sigma, n, **draw)
        return _uniform((math.log(self.sigma[0]), math.log(self.sigma[1])), n, **draw).exp()


def checked_range(name: str, value: float | Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Both ends of a range or of a single number; raises ``ValueError`` unless they are ordered, in ``[low, high]``."""
    bounds = (value, value) if np.isscalar(value) else tuple(value)
    if len(bounds) != 2 or not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(f"{name} must be a number or (low, high) within [{low}, {high}], got {value!r}.")
    return float(bounds[0]), float(bounds[1])


class RandFrequencyWeightedNoise(SeededTransform):
    """Frequency-weighted FFT noise on one magnitude image ``(C, *S)``.

    Args:
        prob: probability of applying it.
        kwargs: ranges, see :class:`NoiseSampler`.

    Raises:
        ValueError: on an image with negative values: a magnitude image has none, so put this before z-scoring.
    """

    def __init__(self, prob: float = 1.0, **kwargs) -> None:
        super().__init__(prob)
        self.sampler = NoiseSampler(**kwargs)

    def apply(self, image: Tensor, spacing: Tensor | None, generator: torch.Generator) -> Tensor:
        if image.min() < 0:
            raise ValueError(
                f"{type(self).__name__} got an image with values down to {float(image.min()):.3g}; a magnitude image "
                "has none below 0: apply it before z-scoring, after scaling to [0, 1]."
            )
        return self.sampler(image, spacing, generator, np.random.RandomState(generator.initial_seed()))


class RandFrequencyWeightedNoised(SeededTransformd):
    """Dictionary twin of :class:`RandFrequencyWeightedNoise`; each key gets noise of its own.

    Args:
        keys: entries to corrupt.
        prob: probability of applying it, drawn once for all keys.
        allow_missing_keys: do not raise if a key is missing.
        kwargs: see :class:`NoiseSampler`.
    """

    def __init__(self, keys: KeysCollection, prob: float = 1.0, allow_missing_keys: bool = False, **kwargs) -> None:
        super().__init__(keys, RandFrequencyWeightedNoise(**kwargs), prob, allow_missing_keys)
