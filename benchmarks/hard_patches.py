"""Masks that hide the patches which the network finds hard: a competitor of inverse frequency projection masking.

After hard patches mining (Wang et al., arXiv 2304.05919): the patches with the highest reconstruction loss are masked,
a share of the masked set that rises during training; the rest is drawn at random. There a second network predicts the
loss; here it is measured with the network as it stands, which needs no second network and cannot be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from monai.utils import ensure_tuple_rep, str2bool
from torch import Tensor, nn

from sspformer.networks import gather_tokens, pad_to_patches, patchify
from sspformer.transforms import MaskIndices, draw_mask, patch_energy


class HardPatchSampler:
    """Stands in for :class:`sspformer.transforms.InverseFrequencyMask` in ``pretrain.json``.

    The loss of every patch of a batch comes from two passes without gradients: a random mask, then one that hides all
    the first left visible. They cost about as much as two thirds of a training step.

    Args:
        network: the masked autoencoder that is being trained.
        patch_size: voxels along each spatial axis, or one number for all.
        spatial_dims: 2 or 3.
        ratio: share of masked patches.
        beta: share of the masked patches that are the hardest ones, 0 to 1; a schedule sets it (:meth:`set_beta`).
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
        self.amp = str2bool(amp)  # the command line gives "false" as a string
        self.set_beta(beta)

    def set_beta(self, beta: float) -> None:
        """Set the share of the hardest patches; a parameter setter for MONAI's ``ParamSchedulerHandler``."""
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
