"""An engine's output with all that metrics and pictures need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import kspace
from ..losses import normalize_patches
from ..networks.layers import gather_tokens, pad_to_patches, patchify, unpatchify
from ..options import flag
from ..transforms.masking import MaskIndices, patch_energy, voxel_mask


class Reconstruct:
    """Postprocessing of pretraining's validation, which adds to the engine's output:

    - ``pred_masked``, ``true_masked``: predicted and clean masked patches ``(B, M, P)``;
    - ``pred_high``, ``true_high``: the same of the quarter of them with the highest energy, see :func:`patch_energy`;
    - ``mean_masked``: the mean of the visible voxels everywhere, which a network reaches that learned nothing;
    - ``reconstruction``, ``clean`` (B, C, *S): the clean image, with the masked patches as predicted and without;
    - ``voxel_mask`` (B, 1, *S), and the ``patch_size``.

    Args:
        network: the masked autoencoder, for its patch size.
        normalize_target: as in the loss; predictions then get the mean and standard deviation of the clean patch.
    """

    def __init__(self, network: torch.nn.Module, normalize_target: bool = False) -> None:
        self.patch_size = tuple(getattr(network, "module", network).patch_size)
        self.normalize_target = flag(normalize_target)

    def __call__(self, output: dict) -> dict:
        target, image = output["label"], output["label"]["image"]
        index, sides = target["mask"], image.shape[2:]
        padded = pad_to_patches(image, self.patch_size)
        patches = patchify(padded, self.patch_size)
        true = gather_tokens(patches, index)
        pred = output["pred"].float()
        if self.normalize_target:
            _, mean, std = normalize_patches(true)
            pred = pred * std + mean

        energy, _ = patch_energy(image, self.patch_size, target["spacing"])
        high = energy.gather(1, index).topk(max(index.shape[1] // 4, 1), dim=1).indices
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
            "patch_size": self.patch_size,
            "voxel_mask": voxel_mask(MaskIndices(target["keep"], index), sides, self.patch_size),
        }


def unpack_targets(output: Mapping[str, Any], data_consistency: bool = False) -> dict[str, Any]:
    """Output of restoration with ``clean`` and ``degraded`` of its targets beside ``pred``.

    Args:
        output: of a batch, or of one sample of it.
        data_consistency: put the measured k-space back into ``pred``, see :func:`sspformer.kspace.data_consistency`.
    """
    output = {**output, **output["label"]}
    if flag(data_consistency):
        if "factor" not in output:
            raise ValueError("data_consistency is for lost resolution: this degradation leaves no k-space to keep.")
        pred, degraded, factor = (torch.as_tensor(output[key]) for key in ("pred", "degraded", "factor"))
        if factor.ndim == 1:
            output["pred"] = kspace.data_consistency(pred[None], degraded[None], factor)[0]
        else:
            output["pred"] = kspace.data_consistency(pred, degraded, factor)
    return output
