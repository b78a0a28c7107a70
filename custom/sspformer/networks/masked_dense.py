"""Pretraining of the whole segmentation network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import SSPFormerDense
from .encoder import Encoder
from .layers import gather_tokens, pad_to_patches, patchify


class MaskedDense(nn.Module):
    """The segmentation network predicts the masked patches, in place of :class:`MaskedAutoencoder`.

    So convolutions and decoder are pretrained, too, not the encoder alone. The encoder sees visible tokens only; one
    learnt token stands for each of the others. On every grid of the convolutional path what lies in masked patches is
    set to 0, or it would flow around the mask: after SparK (Tian et al., arXiv 2301.03580).

    Args:
        encoder: see :class:`Encoder`; its ``hidden_tokens`` takes ``ids_keep``. The sides of its patch are powers of 2.

    Attributes:
        encoder: the segmentation network without its head. This is what :class:`sspformer.engines.SaveEncoder` writes
            and :func:`load_pretrained` loads, into other networks as far as they have the same layers.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = SSPFormerDense(encoder, out_channels=encoder.in_channels)
        self.head, self.encoder.head = self.encoder.head, nn.Identity()
        self.patch_size = tuple(encoder.patch_size)
        self.mask_token = nn.Parameter(torch.zeros(self.encoder.token_projection.out_features))

    def forward(self, image: Tensor, ids_keep: Tensor, ids_predict: Tensor) -> Tensor:
        """As :meth:`MaskedAutoencoder.forward`."""
        network, grid = self.encoder, self.encoder.encoder.grid(image.shape[2:])
        where, shape = ids_keep[..., None], (len(image), math.prod(grid), 1)
        visible = image.new_zeros(shape).scatter(1, where, 1.0).transpose(1, 2).unflatten(2, grid)

        seen = network.project(network.encoder.hidden_tokens(image, network.depths, ids_keep))
        tokens = self.mask_token.to(seen.dtype) * seen.new_ones(shape)
        tokens = tokens.scatter(1, where.expand_as(seen), seen).transpose(1, 2).unflatten(2, grid)

        features, detail = pad_to_patches(image, self.patch_size), []
        features = features * F.interpolate(visible, features.shape[2:])
        for stage in network.stem:
            features = stage(features)
            features = features * F.interpolate(visible, features.shape[2:]).to(features.dtype)
            detail.append(features)
        drawn = self.head(network.forward_decoder(tokens, detail))
        return gather_tokens(patchify(drawn, self.patch_size), ids_predict)
