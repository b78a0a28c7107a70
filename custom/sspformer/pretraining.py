"""What ties the method into MONAI's trainer and evaluator: corrupt and mask a batch on the device, and look at the
result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from monai.data import MetaTensor
from monai.engines import PrepareBatch
from monai.inferers import SimpleInferer
from monai.transforms import MapTransform, Randomizable
from monai.utils import str2bool
from torch import Tensor

from . import kspace
from .files import is_null
from .losses import normalize_patches
from .networks.layers import gather_tokens, pad_to_patches, patchify, unpatchify
from .transforms.masking import MaskIndices, MaskSampler, voxel_mask
from .transforms.noise import NoiseSampler

__all__ = [
    "AutocastInferer",
    "KeepAffined",
    "PrepareBatchOnDevice",
    "PrepareMaskedBatch",
    "Reconstruct",
    "above_mean",
    "check_sides",
    "fast_bfloat16",
    "weight_decay_groups",
]


def check_sides(image_size: Sequence[int], spatial_dims: int) -> None:
    """Raise unless ``image_size`` has ``spatial_dims`` sides."""
    if len(image_size) != spatial_dims:
        raise ValueError(
            f"image_size {list(image_size)} has {len(image_size)} sides, but spatial_dims is {spatial_dims}; for 2D "
            "add the overlay: --config_file \"['configs/pretrain.json','configs/pretrain_2d.json']\"."
        )


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 pays on this device: GPUs from Ampere on, CPUs with AVX-512 or better (oneDNN's own test)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def weight_decay_groups(network: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: matrices decay; biases, norms and the mask token do not."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class KeepAffined(MapTransform):
    """Reduce a MetaTensor to its voxels and its affine: nothing else is needed from here on, and a cache file of it
    loads with ``weights_only``."""

    def __call__(self, data: Mapping) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = MetaTensor(d[key].as_tensor(), affine=d[key].affine)
        return d


def above_mean(image: Tensor) -> Tensor:
    """Where an image is brighter than its mean: a coarse foreground of MRI, whatever the scale. For
    ``CropForegroundd``."""
    return image > image.mean()


class AutocastInferer(SimpleInferer):
    """MONAI's ``SimpleInferer`` under bfloat16 autocast, on CPU and GPU alike; its output is float32 again.

    MONAI's trainer knows autocast for CUDA only. bfloat16 needs no loss scaling, so nothing else of the trainer
    changes.

    Args:
        enabled: False: run in the network's own precision.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = str2bool(enabled)  # the command line gives "false" as a string

    def __call__(self, inputs: Tensor, network, *args, **kwargs):
        autocast = torch.autocast(inputs.device.type, dtype=torch.bfloat16) if self.enabled else nullcontext()
        with autocast:
            output = super().__call__(inputs, network, *args, **kwargs)
        return output.float()


class PrepareBatchOnDevice(PrepareBatch, Randomizable):
    """What both ``prepare_batch`` of ours share: a batch's images on the device, and a generator there.

    Args:
        image_key: entry of the batch, ``(B, C, *S)``; spacing is read from it if it is a MetaTensor.
        seed: of what is drawn; :class:`sspformer.handlers.SeedEpoch` sets it anew each epoch.
    """

    def __init__(self, image_key: str = "image", seed: int = 0) -> None:
        self.image_key = image_key
        self.set_random_state(seed)

    def set_random_state(self, seed=None, state=None) -> PrepareBatchOnDevice:
        """As of MONAI's Randomizable; the generator of the device starts anew as well."""
        super().set_random_state(seed, state)
        self._generator: torch.Generator | None = None
        self._device_seed = int(self.R.randint(2**31))
        return self

    def load(
        self, batchdata: Mapping[str, Tensor], device: torch.device | str, non_blocking: bool = False, **kwargs
    ) -> tuple[Tensor, Tensor, torch.Generator]:
        """Images ``(B, C, *S)``, float32, their spacing in mm ``(B, len(S))``, and the generator, all on the device."""
        image = batchdata[self.image_key]
        spacing = kspace.spacing_of(image)
        image = torch.as_tensor(image).as_subclass(Tensor).to(device, non_blocking=non_blocking, **kwargs).float()
        if spacing is not None and image.device.type == "cuda":
            spacing = spacing.pin_memory().to(device, non_blocking=True)  # the host does not wait for the device
        if self._generator is None or self._generator.device != image.device:
            self._generator = torch.Generator(image.device).manual_seed(self._device_seed)
        return image, kspace.as_spacing(spacing, image), self._generator


class PrepareMaskedBatch(PrepareBatchOnDevice):
    """Noise and masks for a whole batch on the device: MONAI's ``prepare_batch`` of pretraining.

    The masks are drawn from the clean image, the network sees the noisy one.

    Args:
        mask: draws the masks.
        noise: draws the noise; None, or "null" as a command line has it: the input is the clean image.
        predict_visible: ask the network for the visible patches as well, for a loss with ``visible_weight`` above 0.
        image_key: entry of the batch, ``(B, C, *S)``, values in [0, 1]; spacing is read from it if it is a MetaTensor.
        seed: of the noise and the masks; :class:`sspformer.handlers.SeedEpoch` sets it anew each epoch.
    """

    def __init__(
        self,
        mask: MaskSampler,
        noise: NoiseSampler | None = None,
        predict_visible: bool = False,
        image_key: str = "image",
        seed: int = 0,
    ) -> None:
        self.mask, self.noise = mask, None if is_null(noise) else noise
        self.predict_visible = predict_visible
        super().__init__(image_key, seed)

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: torch.device | str, non_blocking: bool = False, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor], tuple, dict[str, Tensor]]:
        """The four parts that MONAI's engines take: noisy image, targets, no arguments, keyword arguments of the
        network.

        The targets are ``image`` (clean), ``noisy``, ``mask`` and ``keep`` (indices), ``energy`` and ``foreground`` of
        the patches, and ``spacing``.
        """
        image, spacing, generator = self.load(batchdata, device, non_blocking, **kwargs)
        indices, energy, foreground = self.mask(image, spacing, generator)
        noisy = image if self.noise is None else self.noise(image, spacing, generator, self.R)
        target = {
            "image": image,
            "noisy": noisy,
            "mask": indices.mask,
            "keep": indices.keep,
            "energy": energy,
            "foreground": foreground,
            "spacing": spacing,
        }
        predict = torch.cat([indices.mask, indices.keep], dim=1) if self.predict_visible else indices.mask
        return noisy, target, (), {"ids_keep": indices.keep, "ids_predict": predict}


class Reconstruct:
    """Postprocessing of the validation: what metrics and pictures need, added to the engine's output.

    - ``pred_masked``, ``true_masked``: predicted and clean masked patches ``(B, M, P)``;
    - ``pred_high``, ``true_high``: the same of the quarter of them with the highest energy;
    - ``mean_masked``: every voxel predicted as the mean of the visible ones: what a network that learned nothing
      reaches;
    - ``reconstruction``, ``clean`` (B, C, *S): masked patches as predicted, visible ones as they are in the clean
      image;
    - ``voxel_mask`` (B, 1, *S).

    Args:
        network: the masked autoencoder, for its patch size.
        normalize_target: as in the loss; predictions are then brought back with the clean patch's mean and standard
            deviation.
    """

    def __init__(self, network: torch.nn.Module, normalize_target: bool = False) -> None:
        self.patch_size = tuple(getattr(network, "module", network).patch_size)
        self.normalize_target = normalize_target

    def __call__(self, output: dict) -> dict:
        target, image = output["label"], output["label"]["image"]
        index, sides = target["mask"], image.shape[2:]
        padded = pad_to_patches(image, self.patch_size)
        patches = patchify(padded, self.patch_size)
        true = gather_tokens(patches, index)
        pred = output["pred"][:, : index.shape[1]].float()
        if self.normalize_target:
            _, mean, std = normalize_patches(true)
            pred = pred * std + mean

        energy = target["energy"].gather(1, index)
        high = energy.topk(max(index.shape[1] // 4, 1), dim=1).indices
        visible_mean = gather_tokens(patches, target["keep"]).mean(dim=(1, 2), keepdim=True)
        filled = patches.scatter(1, index[..., None].expand_as(pred), pred)
        grid = [side // patch for side, patch in zip(padded.shape[2:], self.patch_size)]
        crop = (..., *(slice(0, side) for side in sides))
        return {
            **output,
            "clean": image,
            "pred_masked": pred,
            "true_masked": true,
            "pred_high": gather_tokens(pred, high),
            "true_high": gather_tokens(true, high),
            "mean_masked": visible_mean.expand_as(true),
            "reconstruction": unpatchify(filled, grid, self.patch_size)[crop],
            "voxel_mask": voxel_mask(MaskIndices(target["keep"], index), sides, self.patch_size),
        }
