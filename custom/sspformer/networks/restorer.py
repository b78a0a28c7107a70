"""Restoration: a scan with less noise, or of higher resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..intensity import noise_level
from ..options import flag
from .decoder import DenseNetwork, halvings
from .encoder import Encoder
from .layers import convolution, crop_to, fold, pad_to_patches, unfold


class SSPFormerRestorer(DenseNetwork):
    """Encoder and decoder that add a residual to the image.

    The residual is 0 before training, so restoration starts from its input. Beside the image the convolutions see its
    finest detail, which a mean over 3 voxels along each axis takes away. It is in the unit of the output, so neither
    has to be scaled up to become the other; edges, many units high, are compressed to a few. No norm hides the level of
    the noise. Detail is added to the tokens and goes through residual blocks: a short way to the output.

    Args:
        encoder, features, depths: see :class:`sspformer.networks.decoder.DenseNetwork`.
        residual_scale: the unit of the output, about the size of the residual, so that a step of the optimiser is small
            against it.
        noise_scaled: for denoising: the unit is the noise of the image times ``residual_scale``, see
            :func:`sspformer.intensity.noise_level`. Weak noise then asks for no smaller numbers than strong noise.
        folded: the finest grid is that of the first halving, whose channels hold its voxels (space to depth, as in
            FFDNet, Zhang et al., arXiv 1710.04026). In 3D a place then stands for 8 voxels, and 64 channels take the
            time of 16 on the full grid.
        blocks: residual blocks of two convolutions at each level of the decoder.

    Raises:
        ValueError: if a side of the patch is no power of 2 or too small to be folded, ``blocks`` is below 1, or a depth
            is not in the encoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        features: int = 32,
        residual_scale: float = 1.0,
        noise_scaled: bool = False,
        folded: bool = True,
        blocks: int = 2,
        depths: Sequence[int] | None = None,
    ) -> None:
        noise_scaled, folded = flag(noise_scaled), flag(folded)
        if blocks < 1:
            raise ValueError(f"blocks must be 1 or more, got {blocks}.")
        dims, strides = encoder.spatial_dims, halvings(encoder.patch_size)
        folding = list(strides.pop(0)) if folded else [1] * dims
        if not strides:
            raise ValueError(
                f"folded needs patches that are halved twice or more, got patch_size {encoder.patch_size}."
            )
        convolve = nn.Conv3d if dims == 3 else nn.Conv2d
        places = encoder.in_channels * math.prod(folding)
        super().__init__(
            encoder,
            strides,
            features,
            depths,
            stem_channels=2 * places,
            convolution=partial(convolution, dims),
            fuse=lambda channels: nn.Sequential(*(ResidualBlock(dims, channels) for _ in range(blocks))),
            head=lambda channels: convolve(channels, places, 3, padding=1),
        )
        self.noise_scaled, self.folding = noise_scaled, folding
        # the unit is part of the weights, by a name that weights of the other kind do not have
        for name, used in {"noise_unit": noise_scaled, "intensity_unit": not noise_scaled}.items():
            self.register_buffer(name, torch.tensor(float(residual_scale)), persistent=used)
        with torch.no_grad():
            for block in self.fuse.children():
                for residual in block:  # blocks start near the identity: no norm keeps a sum of many in bounds
                    residual.layers[-1].weight.mul_(0.1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, in_channels, *S)``, any size -> the restored image, ``(B, in_channels, *S)``."""
        unit = self.residual_unit(image)
        edges = 2 * torch.asinh(finest_detail(image) / (2 * unit))
        tokens = self.forward_encoder(image)
        seen = pad_to_patches(torch.cat([image, edges.to(image.dtype)], dim=1), self.encoder.patch_size)
        detail = self.forward_stem(fold(seen, self.folding))
        residual = unfold(self.forward_decoder(tokens, detail), self.folding)
        return image + unit * crop_to(residual, image.shape[2:])

    def residual_unit(self, image: Tensor) -> Tensor:
        """The unit of the residual of ``(B, C, *S)``: one number, or one for each channel, ``(B, C, 1, ...)``."""
        if self.noise_scaled:
            return self.noise_unit * noise_level(image).clamp(min=1e-4).to(image.dtype)  # a flat image has none
        return self.intensity_unit

    def join(self, tokens: Tensor, detail: Tensor) -> Tensor:
        return tokens + detail


class ResidualBlock(nn.Module):
    """Two convolutions whose output is added to their input, ``(B, channels, *S)``."""

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        first = convolution(spatial_dims, channels, channels)
        second = (nn.Conv3d if spatial_dims == 3 else nn.Conv2d)(channels, channels, 3, padding=1)
        self.layers = nn.Sequential(first, second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def finest_detail(image: Tensor) -> Tensor:
    """An image ``(B, C, *S)`` less its mean over 3 voxels along each axis; those at the ends are repeated. float32."""
    image = image.float()
    wider = F.pad(image, [1] * 2 * (image.ndim - 2), mode="replicate")
    if image.ndim == 5:
        return image - F.avg_pool3d(wider, kernel_size=3, stride=1)
    return image - F.avg_pool2d(wider, kernel_size=3, stride=1)
