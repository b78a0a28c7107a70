"""MONAI's networks as contenders of ours."""

from __future__ import annotations

import math

import torch
from monai.networks.nets import MaskedAutoEncoderViT
from torch import Tensor

from sspformer.networks import SIZES


class MonaiMaskedAutoencoder(MaskedAutoEncoderViT):
    """MONAI's masked autoencoder with the widths, depths and heads of a size of ours; learnable position embeddings.

    ``sincos``: MONAI's default position embedding instead. In 3D its widths must divide by 6, so they are rounded
    down to that (tiny: 252 for 256). ``given_keep``, visible tokens ``(B, K)``, replaces the mask that MONAI draws in
    its forward pass; None: it draws.
    """

    given_keep: Tensor | None = None

    def __init__(self, size: str, image_size: int, patch_size: int, mask_ratio: float, sincos: bool = False) -> None:
        preset = dict(SIZES[size])
        if sincos:
            for dim, heads in (("dim", "num_heads"), ("decoder_dim", "decoder_num_heads")):
                preset[dim] -= preset[dim] % math.lcm(6, preset[heads])
        super().__init__(
            in_channels=1,
            img_size=(image_size,) * 3,
            patch_size=(patch_size,) * 3,
            hidden_size=preset["dim"],
            mlp_dim=4 * preset["dim"],
            num_layers=preset["depth"],
            num_heads=preset["num_heads"],
            masking_ratio=mask_ratio,
            decoder_hidden_size=preset["decoder_dim"],
            decoder_mlp_dim=4 * preset["decoder_dim"],
            decoder_num_layers=preset["decoder_depth"],
            decoder_num_heads=preset["decoder_num_heads"],
            pos_embed_type="sincos" if sincos else "learnable",
            decoder_pos_embed_type="sincos" if sincos else "learnable",
            qkv_bias=True,  # ours has one
        )

    def _masking(self, x: Tensor, masking_ratio: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if self.given_keep is None:
            return super()._masking(x, masking_ratio)
        keep = self.given_keep
        mask = torch.ones(x.shape[:2], dtype=torch.int, device=x.device).scatter_(1, keep, 0)
        return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1])), keep, mask


def monai_loss(pred: Tensor, mask: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error of masked patches: predicted and clean ones ``(B, N, P)``, mask ``(B, N)``, 1 where masked."""
    error = (pred.float() - clean).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()
