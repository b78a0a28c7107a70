"""Noise, masks and lower resolution for a whole batch on the device: ``prepare_batch`` of MONAI's engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.transforms import Randomizable
from torch import Tensor

from .. import kspace
from ..options import is_null
from ..transforms.masking import MaskIndices
from ..transforms.noise import NoiseSampler


class PrepareBatchOnDevice(PrepareBatch, Randomizable):
    """Base class: the images of a batch on the device, and a generator there.

    Args:
        seed: of all draws; :class:`sspformer.engines.SeedEpoch` sets a new one each epoch.
    """

    def __init__(self, seed: int = 0) -> None:
        self.set_random_state(seed)

    def set_random_state(self, seed=None, state=None) -> PrepareBatchOnDevice:
        """As in MONAI's ``Randomizable``; the generator on the device starts again, too."""
        super().set_random_state(seed, state)
        self._generator: torch.Generator | None = None
        self._device_seed = int(self.R.randint(2**31))
        return self

    def load(
        self, batchdata: Mapping[str, Tensor], device: torch.device | str, non_blocking: bool = False, **kwargs
    ) -> tuple[Tensor, Tensor, torch.Generator]:
        """Images ``(B, C, *S)``, float32, their spacing in mm ``(B, len(S))``, and the generator, all on the device.

        They are the batch's ``image``; the spacing is its ``spacing``, or that of a MetaTensor.
        """
        image = batchdata["image"]
        spacing = batchdata["spacing"] if "spacing" in batchdata else kspace.spacing_of(image)
        image = torch.as_tensor(image).as_subclass(Tensor).to(device, non_blocking=non_blocking, **kwargs).float()
        if spacing is not None and image.device.type == "cuda" and spacing.device.type == "cpu":
            spacing = spacing.pin_memory().to(device, non_blocking=True)  # the host does not wait for the device
        if self._generator is None or self._generator.device != image.device:
            self._generator = torch.Generator(image.device).manual_seed(self._device_seed)
        return image, kspace.as_spacing(spacing, image), self._generator


class PrepareMaskedBatch(PrepareBatchOnDevice):
    """``prepare_batch`` of pretraining: masks drawn from the clean image, and the noisy image that the network sees.

    Args:
        mask: a mask strategy, see :mod:`sspformer.transforms.masking`.
        noise: draws the noise; None, or "null" as a command line has it: the input is the clean image.
        seed: of the noise and the masks; :class:`sspformer.engines.SeedEpoch` sets a new one each epoch.
    """

    def __init__(
        self,
        mask: Callable[[Tensor, Tensor, torch.Generator], MaskIndices],
        noise: NoiseSampler | None = None,
        seed: int = 0,
    ) -> None:
        self.mask, self.noise = mask, None if is_null(noise) else noise
        super().__init__(seed)

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: torch.device | str, non_blocking: bool = False, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor], tuple, dict[str, Tensor]]:
        """The four parts that MONAI's engines take: noisy image, targets, no arguments, keyword arguments of the
        network.

        The targets are ``image`` (clean), ``noisy``, ``mask`` and ``keep`` (indices), and ``spacing``.
        """
        image, spacing, generator = self.load(batchdata, device, non_blocking, **kwargs)
        indices = self.mask(image, spacing, generator)
        noisy = image if self.noise is None else self.noise(image, spacing, generator, self.R)
        target = {"image": image, "noisy": noisy, "mask": indices.mask, "keep": indices.keep, "spacing": spacing}
        return noisy, target, (), {"ids_keep": indices.keep, "ids_predict": indices.mask}


class PrepareDegradedBatch(PrepareBatchOnDevice):
    """``prepare_batch`` of restoration: degrades clean images.

    A Fourier transform wraps around at the border of a crop, where the scan goes on. So crops have a margin, which is
    degraded with them and then cut off. Values below 0, which a magnitude image has none of, become 0.

    Args:
        degradation: called as ``degradation(image, spacing, generator, random_state)``, as
            :class:`sspformer.transforms.NoiseSampler` and :class:`sspformer.transforms.ResolutionSampler` are.
        margin: voxels at each end of each spatial axis; 0 for whole scans.
        seed: of the degradation; :class:`sspformer.engines.SeedEpoch` sets a new one each epoch.

    Raises:
        ValueError: if ``margin`` is negative, or leaves nothing of a batch.
    """

    def __init__(self, degradation: Any, margin: int = 0, seed: int = 0) -> None:
        if margin < 0:
            raise ValueError(f"margin must be 0 or more, got {margin}.")
        self.degradation, self.margin = degradation, margin
        super().__init__(seed)

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: torch.device | str, non_blocking: bool = False, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor], tuple, dict]:
        """The four parts that MONAI's engines take: degraded image, targets ``clean`` and ``degraded``, nothing more.

        All are ``(B, C, *S)`` with ``S`` less twice the margin. Where resolution is lost, ``factor``, ``(B, len(S))``,
        says which k-space was measured.
        """
        sides = tuple(batchdata["image"].shape[2:])
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
        """The level of each sample of the last batch: the ``sigma`` or ``factor`` that the sampler drew."""
        return getattr(self.degradation, "drawn", {})
