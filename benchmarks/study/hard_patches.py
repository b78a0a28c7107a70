"""Masks that hide the patches that the network finds hard: a rival of inverse frequency projection masking.

After hard patches mining (Wang et al., arXiv 2304.05919): a share of the masked patches, which rises during training,
are those with the highest reconstruction loss; the rest is random. There a second network predicts the loss. Here the
network itself measures it, which needs no second network and cannot be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from sspformer.networks import gather_tokens, pad_to_patches, patchify
from sspformer.options import flag
from sspformer.transforms import MaskIndices, draw_mask, patch_energy


class HardPatchMask:
    """A mask strategy for ``pretrain.json``.

    The loss of every patch comes from two passes without gradients: a random mask, then one that hides all that the
    first left visible. They take about two thirds of the time of a training step.

    Args:
        network: the masked autoencoder in training.
        patch_size: voxels along each spatial axis, or one number for all.
        spatial_dims: 2 or 3.
        ratio: share of masked patches.
        beta: share of the hardest patches among the masked ones, 0 to 1; a schedule sets it (:meth:`set_beta`).
        amp: bfloat16 autocast in these passes.
    """

    def __init__(
        self,
        network: nn.Module,
        patch_size: Sequence[int] | int,
        spatial_dims: int = 3,
        ratio: float = 0.75,
        beta: float = 0.0,
        amp: bool = True,
    ) -> None:
        self._network = network
        self.patch_size = ensure_tuple_rep(patch_size, spatial_dims)
        self.ratio = ratio
        self.amp = flag(amp)
        self.set_beta(beta)

    def set_beta(self, beta: float) -> None:
        """Set the share of the hardest patches; MONAI's ``ParamSchedulerHandler`` calls it."""
        self.beta = float(beta)

    def __call__(
        self, image: Tensor, spacing: Sequence[float] | Tensor | None = None, generator: torch.Generator | None = None
    ) -> MaskIndices:
        """Masks of images ``(B, C, *S)``."""
        _, foreground = patch_energy(image, self.patch_size, spacing)
        score = torch.zeros(foreground.shape, device=image.device)
        n_hard = round(self.beta * round(self.ratio * score.shape[1]))
        if n_hard > 0:
            loss = self.patch_loss(image, foreground, generator)
            score.scatter_(1, loss.topk(n_hard, dim=1).indices, 1e3)  # far above the Gumbel noise: surely masked
        return draw_mask(score, self.ratio, 1.0, foreground, generator=generator)

    @torch.no_grad()
    def patch_loss(self, image: Tensor, foreground: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of every patch when it is hidden, ``(B, N)``."""
        patches = patchify(pad_to_patches(image, self.patch_size), self.patch_size)
        error, count = torch.zeros_like(patches[..., 0]), torch.zeros_like(patches[..., 0])
        score = error
        for _ in range(2):
            indices = draw_mask(score, self.ratio, 1.0, foreground, generator=generator)
            autocast = torch.autocast(image.device.type, dtype=torch.bfloat16) if self.amp else nullcontext()
            with autocast:
                pred = self._network(image, indices.keep, indices.mask)
            square = (pred.float() - gather_tokens(patches, indices.mask)).square().mean(dim=-1)
            error = error.scatter_add(1, indices.mask, square)
            count = count.scatter_add(1, indices.mask, torch.ones_like(square))
            score = torch.zeros_like(error).scatter(1, indices.keep, 1e3)  # hide next what was visible
        return error / count.clamp(min=1)
