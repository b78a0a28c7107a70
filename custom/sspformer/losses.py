"""The losses of pretraining, segmentation and restoration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from . import kspace
from .networks.layers import gather_patches, pad_to_patches, unpatchify
from .options import flag

__all__ = [
    "BalancedDiceCELoss",
    "MaskedReconstructionLoss",
    "RestorationLoss",
    "StandardizedMSELoss",
    "normalize_patches",
]


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches ``(B, N, P)`` less their means, over their standard deviations; and the means and deviations."""
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


class MaskedReconstructionLoss(nn.Module):
    """Mean squared error of predicted patches against the clean image: ``mse + spectral_weight * spectral``.

    The spectral term is the energy of the error over the masked patches, weighed in k-space by the high-pass
    ``W(rho) = rho``; were ``W`` 1 everywhere, it would be the first term again (Parseval).

    Args:
        patch_size: voxels along each spatial axis, or one number for all.
        spatial_dims: 2 or 3.
        spectral_weight: weight of the spectral term, 0 or more.
        normalize_target: predict patches as :func:`normalize_patches` gives them (He et al., arXiv 2111.06377).

    Raises:
        ValueError: if ``spectral_weight`` is negative.
    """

    def __init__(
        self,
        patch_size: Sequence[int] | int,
        spatial_dims: int = 3,
        spectral_weight: float = 0.0,
        normalize_target: bool = False,
    ) -> None:
        super().__init__()
        if spectral_weight < 0:
            raise ValueError(f"spectral_weight must be 0 or more, got {spectral_weight}.")
        self.patch_size = ensure_tuple_rep(patch_size, spatial_dims)
        self.spectral_weight = spectral_weight
        self.normalize_target = flag(normalize_target)

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar.

        Args:
            pred: predicted patches ``(B, M, P)``.
            target: ``image``, the clean image ``(B, C, *S)``; ``mask``, indices of the predicted patches ``(B, M)``;
                and, for the spectral term, ``spacing`` in mm ``(B, len(S))``.

        Raises:
            ValueError: if the number of predicted patches is not that of the masked ones.
        """
        index = target["mask"]
        if pred.shape[1] != index.shape[1]:
            raise ValueError(f"got {pred.shape[1]} predicted patches for {index.shape[1]} masked ones.")
        image = pad_to_patches(target["image"].float(), self.patch_size)
        clean = gather_patches(image, self.patch_size, index)
        if self.normalize_target:
            clean, *_ = normalize_patches(clean)
        pred = pred.float()
        loss = F.mse_loss(pred, clean)
        if self.spectral_weight > 0:
            loss = loss + self.spectral_weight * self.spectral(pred - clean, index, image, target["spacing"])
        return loss

    def spectral(self, error: Tensor, index: Tensor, image: Tensor, spacing: Tensor) -> Tensor:
        """High-pass energy of the error ``(B, M, P)`` of the masked patches in their places, per voxel of them."""
        grid = [side // patch for side, patch in zip(image.shape[2:], self.patch_size)]
        patches = error.new_zeros(error.shape[0], math.prod(grid), error.shape[2])
        patches = patches.scatter(1, index[..., None].expand_as(error), error)
        volume = unpatchify(patches, grid, self.patch_size)
        weight = kspace.highpass(kspace.radial_frequency(volume, spacing, half=True), gamma=1.0)
        return kspace.filter_image(volume, weight).square().sum() / error.numel()


class BalancedDiceCELoss(DiceCELoss):
    """MONAI's ``DiceCELoss`` with class weights in the cross entropy alone.

    Without weights, cross entropy ignores small structures until the large ones are learnt. Dice is balanced by itself,
    but MONAI would weigh it, too.

    Args:
        class_weight: of each class, background included; see :func:`sspformer.data.class_weights`.
        kwargs: of ``DiceCELoss``, without ``weight``.
    """

    def __init__(self, class_weight: Tensor | Sequence[float], **kwargs) -> None:
        super().__init__(**kwargs)
        self.cross_entropy.weight = torch.as_tensor(class_weight, dtype=torch.float32)
        usual = {"to_onehot_y": True, "softmax": True, "include_background": False, "batch": True}
        self._usual = kwargs == usual

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of logits ``(B, C, *S)`` and labels ``(B, 1, *S)``.

        It is MONAI's, which ``torch.compile`` cannot take as one graph; with the settings of the bundle it gets
        :meth:`in_one_graph`.
        """
        if self._usual and torch.compiler.is_compiling():
            return self.in_one_graph(input, target)
        return super().forward(input, target)

    def in_one_graph(self, input: Tensor, target: Tensor) -> Tensor:
        """The same with softmax, without the background, Dice over the batch."""
        label, log_prob = target[:, 0].long(), input.log_softmax(dim=1)
        classes = torch.arange(1, input.shape[1], device=input.device).reshape(-1, *[1] * (input.ndim - 2))
        truth, prob, dims = label[:, None] == classes, log_prob[:, 1:].exp(), (0, *range(2, input.ndim))
        overlap, total = torch.where(truth, prob, 0.0).sum(dims), prob.sum(dims) + truth.sum(dims)
        dice = 1 - (2 * overlap + self.dice.smooth_nr) / (total + self.dice.smooth_dr)
        cross_entropy = F.nll_loss(log_prob, label, self.cross_entropy.weight)
        return self.lambda_dice * dice.mean() + self.lambda_ce * cross_entropy


class StandardizedMSELoss(nn.Module):
    """Mean squared error of numbers, in units of the standard deviation of the training targets.

    Args:
        network: a :class:`sspformer.networks.ScanPredictor`, which knows that deviation.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = [network]  # in a list it is no part of this module

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of predictions and targets ``(B, out_channels)``."""
        return ((pred - target) / self._network[0].target_std).square().mean()


class RestorationLoss(nn.Module):
    r"""Minus the gain in PSNR, in dB, averaged over the batch: how much of the degradation's error is left.

    .. math:: 10 \log_{10} \frac{mse(pred, clean) + \epsilon}{mse(degraded, clean) + \epsilon}

    The strongest degradations would rule the plain squared error. Here all count alike, so a network that cannot tell
    the level learns not to harm a scan that has hardly any.

    If the target has the ``factor`` of a lower resolution, :func:`sspformer.kspace.data_consistency` comes before the
    comparison. The network need not find out which k-space was measured, and may write anything there, so apply the
    same step after it in use.

    Args:
        eps: mean square that counts as nothing, above 0; 1e-6 is a thousandth of the intensity range.
        margin: that of :class:`PrepareDegradedBatch`.

    Raises:
        ValueError: if ``eps`` is not above 0, or ``margin`` is negative.
    """

    def __init__(self, eps: float = 1e-6, margin: int = 0) -> None:
        super().__init__()
        if eps <= 0:
            raise ValueError(f"eps must be above 0, got {eps}.")
        if margin < 0:
            raise ValueError(f"margin must be 0 or more, got {margin}.")
        self.eps, self.margin = eps, margin

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, from ``pred`` and the target's ``clean`` and ``degraded``, all ``(B, C, *S)``, and its
        ``factor``, ``(B, len(S))``, if it has one."""

        def error(image: Tensor) -> Tensor:
            return (image.float() - target["clean"]).square().flatten(1).mean(dim=1) + self.eps

        if "factor" in target:
            pred = kspace.data_consistency(pred, target["degraded"], target["factor"], self.margin)
        return 10 * (error(pred).log10() - error(target["degraded"]).log10()).mean()
