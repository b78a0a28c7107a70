"""The network for whole scans: a class or a number for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import Encoder
from .layers import pad_to_patches


class ScanPredictor(nn.Module):
    """An encoder and a linear layer: scores of classes, or numbers, for a whole scan.

    The mean of the tokens is standardised and goes through the linear layer. The encoder sees the brightest patches
    alone, as it sees part of them in pretraining: the air around a head costs no time and does not drown the mean.

    Args:
        encoder: see :class:`sspformer.networks.Encoder`.
        out_channels: classes, or numbers to predict.
        visible: share of the patches that the encoder sees, those with the highest mean intensity, in (0, 1].

    Raises:
        ValueError: if ``visible`` is out of its range.
    """

    def __init__(self, encoder: Encoder, out_channels: int = 1, visible: float = 0.5) -> None:
        super().__init__()
        if not 0 < visible <= 1:
            raise ValueError(f"visible must be in (0, 1], got {visible}.")
        self.encoder = encoder
        self.visible = visible
        self.spatial_dims = encoder.spatial_dims
        self.patch_size = encoder.patch_size
        self.head = nn.Linear(encoder.dim, out_channels)
        nn.init.zeros_(self.head.weight)  # starts from the mean of the targets, or from equal classes
        nn.init.zeros_(self.head.bias)
        for name, size in {"token": encoder.dim, "target": out_channels}.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def forward(self, image: Tensor) -> Tensor:
        """``(B, in_channels, *S)``, background near 0, any size -> ``(B, out_channels)``: logits or numbers."""
        pooled = (self.pool(image).float() - self.token_mean) / self.token_std
        return self.head(pooled).float() * self.target_std + self.target_mean

    def pool(self, image: Tensor) -> Tensor:
        """Mean of the tokens of the brightest patches, ``(B, dim)``."""
        visible = pad_to_patches(image.mean(dim=1, keepdim=True), self.patch_size)
        if self.spatial_dims == 3:
            levels = F.avg_pool3d(visible, self.patch_size).flatten(1)
        else:
            levels = F.avg_pool2d(visible, self.patch_size).flatten(1)
        ids_keep = levels.topk(max(1, int(self.visible * levels.shape[1])), dim=1).indices
        return self.encoder(image, ids_keep).mean(dim=1)

    def standardize(self, pooled: Tensor, targets: Tensor | None = None) -> None:
        """Take the mean and the standard deviation of training subjects as the zero and the unit of the linear layer.

        So one learning rate suits every target, whose unit is that of the output.

        Args:
            pooled: of :meth:`pool`, ``(N, dim)``.
            targets: numbers ``(N, out_channels)``; None for classes.
        """
        for name, values in {"token": pooled, "target": targets}.items():
            if values is not None:
                values = values.double()
                std = values.std(dim=0, correction=0)
                getattr(self, f"{name}_mean").copy_(values.mean(dim=0))
                getattr(self, f"{name}_std").copy_(torch.where(std > 1e-6, std, 1.0))
