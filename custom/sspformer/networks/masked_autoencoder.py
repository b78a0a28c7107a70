"""The masked autoencoder that pretrains an encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .encoder import SIZES, Encoder, init_weights
from .layers import Block, LayerNorm, RotaryPosition, select_positions


class MaskedAutoencoder(nn.Module):
    """Encode the visible patches of a noisy image, predict the masked patches of the clean one (docs/method.md).

    The masked autoencoder of He et al. (arXiv 2111.06377) with the decoder of Fu et al. ("CrossMAE", arXiv 2401.14391):
    every patch to predict is a mask token that attends to the visible tokens, not to the other mask tokens. In 3D a
    decoder over all tokens costs more than the encoder; this one costs less, and predicts only what is asked for.

    Args:
        encoder: see :class:`sspformer.networks.Encoder`.
        decoder_dim: channels of the decoder; None: of the smallest of :data:`sspformer.networks.SIZES` whose encoder is
            as wide as this one.
        decoder_depth: blocks of the decoder; None: as ``decoder_dim``.
        decoder_num_heads: attention heads of the decoder; None: as ``decoder_dim``.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch_size = tuple(encoder.patch_size)

        preset = next((row for row in SIZES.values() if row["dim"] >= encoder.dim), SIZES["base"])
        dim = decoder_dim or preset["decoder_dim"]
        depth = decoder_depth or preset["decoder_depth"]
        num_heads = decoder_num_heads or preset["decoder_num_heads"]
        self.decoder_embedding = nn.Linear(encoder.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_position = RotaryPosition(dim // num_heads, encoder.spatial_dims)
        self.decoder_blocks = nn.ModuleList(Block(dim, num_heads, cross=True) for _ in range(depth))
        self.decoder_norm = LayerNorm(dim)
        self.head = nn.Linear(dim, encoder.in_channels * math.prod(self.patch_size))
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
        context = self.decoder_embedding(visible)
        rotation = self.decoder_position(grid).to(context.dtype)  # once for all blocks
        rotation_keep = select_positions(rotation, ids_keep)
        rotation_predict = select_positions(rotation, ids_predict)

        tokens = self.mask_token.to(context.dtype)  # all start alike: the first block's queries differ by rotation only
        for block in self.decoder_blocks:
            tokens = block(tokens, rotation_predict, context, rotation_keep)
        return self.head(self.decoder_norm(tokens))
