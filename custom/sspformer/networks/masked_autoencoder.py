"""The masked autoencoder that pretrains the SSPFormer encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .encoder import SSPFormerEncoder, init_weights, size_preset
from .layers import Block, RotaryPosition, select_positions

__all__ = ["MaskedAutoencoder"]


class MaskedAutoencoder(nn.Module):
    """Encode the visible patches of a noisy image, predict the masked patches of the clean one (docs/METHOD.md).

    The masked autoencoder of He et al. (arXiv 2111.06377) with the decoder of Fu et al. ("CrossMAE", arXiv 2401.14391):
    every patch to predict is a mask token that attends to the visible tokens, not to the other mask tokens. In 3D,
    where the patches are many, a decoder over all tokens costs more than the encoder; this one does not, and predicts
    only what is asked for.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        patch_size: voxels along each spatial axis, or one number for all.
        size: preset of the encoder's and the decoder's width, depth and heads, see :data:`sspformer.networks.SIZES`.
        decoder_dim: channels of the decoder, in place of the preset's.
        decoder_depth: blocks of the decoder, in place of the preset's.
        decoder_num_heads: attention heads of the decoder, in place of the preset's.
        encoder_kwargs: further arguments of :class:`SSPFormerEncoder`.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        patch_size: Sequence[int] | int = 8,
        size: str = "tiny",
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
        **encoder_kwargs,
    ) -> None:
        super().__init__()
        self.encoder = SSPFormerEncoder(spatial_dims, in_channels, patch_size, size, **encoder_kwargs)
        self.patch_size = self.encoder.patch_size

        preset = size_preset(size)
        dim = decoder_dim or preset["decoder_dim"]
        depth = decoder_depth or preset["decoder_depth"]
        num_heads = decoder_num_heads or preset["decoder_num_heads"]
        self.decoder_embedding = nn.Linear(self.encoder.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_position = RotaryPosition(dim // num_heads, spatial_dims)
        self.decoder_blocks = nn.ModuleList(Block(dim, num_heads, cross=True) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, self.encoder.patch_embedding.in_features)
        for module in (self.decoder_embedding, self.decoder_blocks, self.head):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)  # start near zero, not with an error larger than the image

    def forward(self, image: Tensor, ids_keep: Tensor, ids_predict: Tensor) -> Tensor:
        """Predict patches of the clean image.

        Args:
            image: noisy images ``(B, C, *S)``, of any size.
            ids_keep: visible tokens ``(B, K)``; nothing else of the image reaches the network.
            ids_predict: tokens to predict ``(B, M)``, usually the masked ones.

        Returns:
            Patches ``(B, M, C * prod(patch_size))`` in the order of :func:`sspformer.networks.patchify`.
        """
        visible = self.encoder(image, ids_keep)
        return self.decode(visible, ids_keep, ids_predict, self.encoder.grid(image.shape[2:]))

    def decode(self, visible: Tensor, ids_keep: Tensor, ids_predict: Tensor, grid: Sequence[int]) -> Tensor:
        """Mask tokens at ``ids_predict`` gather from the ``visible`` tokens ``(B, K, D)`` by cross-attention."""
        rotation = self.decoder_position(grid)
        rotation_keep = select_positions(rotation, ids_keep)
        rotation_predict = select_positions(rotation, ids_predict)

        context = self.decoder_embedding(visible)
        tokens = self.mask_token.expand(*ids_predict.shape, -1)
        for block in self.decoder_blocks:
            tokens = block(tokens, rotation_predict, context, rotation_keep)
        return self.head(self.decoder_norm(tokens))
