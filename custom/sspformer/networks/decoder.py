"""What segmentation and restoration share: a convolutional path for detail, and a decoder that joins it to tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .encoder import Encoder
from .layers import LayerNorm


class DenseNetwork(nn.Module):
    """Encoder tokens for context, convolutions for detail, a decoder that doubles the grid until both have met.

    ::

        image -- stem: convolutions, halved down to the grid above the tokens' -- detail at each scale
          |                                                                         |
          +---- encoder -- tokens of several depths, projected -- doubled, joined with the detail -- head

    The token grid of a patch of 8 is coarse (16 mm at 2 mm voxels): tokens say what is where, the convolutions draw its
    border. After UNETR (Hatamizadeh et al., arXiv 2103.10504), with the convolutional stem of ViT-Adapter (Chen et al.,
    arXiv 2205.08534) in place of deep skip connections.

    :class:`SSPFormerDense` and :class:`SSPFormerRestorer` choose the layers and say how detail joins the tokens.

    Args:
        encoder: see :class:`Encoder`; the sides of its patch are powers of 2.
        strides: from the finest grid to the tokens', see :func:`halvings`.
        features: channels on the finest grid; doubled at each halving.
        depths: encoder blocks (1 is the first) whose tokens the decoder sees; None: a third, two thirds and all.
        stem_channels: channels that the stem sees.
        convolution: makes a convolution with its norm and activation from ``(channels in, channels out, stride)``.
        fuse: makes the layers that follow each doubling from its channels.
        head: makes the last layer from the channels on the finest grid.

    Raises:
        ValueError: if a depth is not in the encoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        strides: Sequence[tuple[int, ...]],
        features: int,
        depths: Sequence[int] | None,
        stem_channels: int,
        convolution: Callable[[int, int, Sequence[int] | int], nn.Module],
        fuse: Callable[[int], nn.Module],
        head: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        n_blocks = len(encoder.blocks)
        self.depths = tuple(depths or sorted({-(-n_blocks * third // 3) for third in (1, 2, 3)}))
        if not all(1 <= depth <= n_blocks for depth in self.depths):
            raise ValueError(f"depths must be within 1 and {n_blocks}, the blocks of the encoder, got {self.depths}.")
        channels = [features * 2**level for level in range(len(strides) + 1)]  # the last: of the token grid

        self.encoder = encoder
        self.stem = nn.ModuleList([convolution(stem_channels, channels[0], 1)])
        for level, stride in enumerate(strides[:-1]):
            narrow, wide = channels[level], channels[level + 1]
            self.stem.append(nn.Sequential(convolution(narrow, wide, stride), convolution(wide, wide, 1)))

        self.token_norms = nn.ModuleList(LayerNorm(encoder.dim) for _ in self.depths)
        self.token_projection = nn.Linear(encoder.dim * len(self.depths), channels[-1])
        transposed = nn.ConvTranspose3d if encoder.spatial_dims == 3 else nn.ConvTranspose2d
        self.upsample, self.fuse = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(strides))):
            narrow, wide = channels[level], channels[level + 1]
            self.upsample.append(transposed(wide, narrow, kernel_size=strides[level], stride=strides[level]))
            self.fuse.append(fuse(narrow))
        self.head = head(channels[0])
        for module in (*self.stem.modules(), *self.fuse.modules()):
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):  # PyTorch's own start shrinks what no norm scales up again
                nn.init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")

    def forward_encoder(self, image: Tensor) -> Tensor:
        """Tokens of all ``depths``, projected, on their grid: ``(B, C, *grid)``."""
        tokens = self.project(self.encoder.hidden_tokens(image, self.depths))
        return tokens.transpose(1, 2).unflatten(2, self.encoder.grid(image.shape[2:]))

    def project(self, hidden: list[Tensor]) -> Tensor:
        """Tokens of all ``depths``, ``(B, N, dim)`` each -> ``(B, N, C)``."""
        return self.token_projection(torch.cat([norm(hidden[i]) for i, norm in enumerate(self.token_norms)], dim=-1))

    def forward_stem(self, image: Tensor) -> list[Tensor]:
        """Detail on the finest grid, ``(B, features, *S)``, and on each halved one, finest first."""
        detail: list[Tensor] = []
        for stage in self.stem:
            image = stage(image)
            detail.append(image)
        return detail

    def forward_decoder(self, tokens: Tensor, detail: list[Tensor]) -> Tensor:
        """From the token grid up to the finest one: the head's output ``(B, C, *S)``."""
        for level, (upsample, fuse) in enumerate(zip(self.upsample, self.fuse), start=1):
            tokens = fuse(self.join(upsample(tokens), detail[-level]))
        return self.head(tokens)

    def join(self, tokens: Tensor, detail: Tensor) -> Tensor:
        """Tokens and detail of one grid, ``(B, C, *S)`` each, as the input of the layers that fuse them."""
        raise NotImplementedError


def halvings(patch_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Strides that lead from voxels to tokens, finest first: 2 along each axis whose patch is not yet used up.

    >>> halvings((8, 8, 2))
    [(2, 2, 1), (2, 2, 1), (2, 2, 2)]

    Raises:
        ValueError: if a side is no power of 2, or all are 1.
    """
    if max(patch_size) < 2 or any(patch < 1 or patch & (patch - 1) for patch in patch_size):
        raise ValueError(f"patch_size must be powers of 2, at least one above 1, got {tuple(patch_size)}.")
    levels = [patch.bit_length() - 1 for patch in patch_size]
    steps = max(levels)
    # an axis with a small patch has coarse voxels: it is halved last, when the others have caught up
    return [tuple(2 if step >= steps - n else 1 for n in levels) for step in range(steps)]
