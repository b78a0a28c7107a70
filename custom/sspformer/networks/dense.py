"""Segmentation: class scores for every voxel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .decoder import DenseNetwork, halvings
from .encoder import Encoder
from .layers import convolution, crop_to, pad_to_patches


class SSPFormerDense(DenseNetwork):
    """Encoder and light decoder for segmentation: a normalised convolution fuses the tokens with detail beside them.

    Args:
        encoder, features, depths: see :class:`sspformer.networks.decoder.DenseNetwork`.
        out_channels: classes, background included.

    Attributes:
        head_factor: learning rate of the head over that of the decoder, for a head that starts from random weights.
            AdamW moves a weight by about the learning rate in a step, whatever its gradient, and the head has few
            features, which are normalised: at the rate of the decoder its logits grow for hundreds of steps.

    Raises:
        ValueError: if a side of the patch is no power of 2, or a depth is not in the encoder.
    """

    head_factor = 10.0

    def __init__(
        self, encoder: Encoder, out_channels: int = 2, features: int = 16, depths: Sequence[int] | None = None
    ) -> None:
        dims = encoder.spatial_dims
        super().__init__(
            encoder,
            halvings(encoder.patch_size),
            features,
            depths,
            stem_channels=encoder.in_channels,
            convolution=partial(convolution, dims, norm=True),
            fuse=lambda channels: convolution(dims, 2 * channels, channels, norm=True),
            head=lambda channels: (nn.Conv3d if dims == 3 else nn.Conv2d)(channels, out_channels, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """``(B, in_channels, *S)``, any size -> logits ``(B, out_channels, *S)``."""
        tokens = self.forward_encoder(image)
        detail = self.forward_stem(pad_to_patches(image, self.encoder.patch_size))
        return crop_to(self.forward_decoder(tokens, detail), image.shape[2:])

    def join(self, tokens: Tensor, detail: Tensor) -> Tensor:
        return torch.cat([tokens, detail], dim=1)
