"""The dense network of the three tasks: encoder tokens for context, a convolutional path for detail."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.utils import str2bool
from torch import Tensor, nn

from ..intensity import noise_level
from .encoder import SSPFormerEncoder
from .layers import pad_to_patches

__all__ = ["SSPFormerDense"]


class SSPFormerDense(nn.Module):
    """SSPFormer encoder and a lightweight decoder: class scores, or a restored image, for every voxel.

    ::

        image -- shallow convolutions, halved down to the grid above the tokens' -- detail at each scale
          |                                                                          |
          +---- encoder -- tokens of several depths, projected --- doubled, joined with the detail -- head

    The token grid of a patch of 8 is coarse (16 mm at 2 mm voxels): tokens say what is where, the convolutions draw its
    border. After the idea of UNETR (Hatamizadeh et al., arXiv 2103.10504) with the convolutional stem of ViT-Adapter
    (Chen et al., arXiv 2205.08534) in place of deep skip connections.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included; or channels of the restored image.
        patch_size: voxels along each spatial axis, powers of 2, or one number for all.
        size: preset of the encoder, see :data:`sspformer.networks.SIZES`.
        features: channels of the convolutions on the full grid; doubled at each halving.
        residual: the head's output is added to the image, and is 0 before training: restoration starts from its input.
            Beside the image the convolutions then see its finest detail, what a mean over 3 voxels along each axis
            takes away, in the units of the output: neither has to be blown up to become the other. Edges, many units
            high, are compressed to a few.
        residual_scale: the unit of that output, about the size of the residual, so that a step of the optimiser is
            small against it.
        noise_scaled: the unit is the image's noise times that, see :func:`noise_level`, for denoising: weak noise then
            asks for no smaller numbers than strong noise.
        folded: the convolutions start on the grid of the first halving, whose channels hold its voxels (space to depth,
            as in FFDNet, Zhang et al., arXiv 1710.04026), and the head ends on it. In 3D a place then stands for 8
            voxels, and for the time of 16 channels on the full grid there are 64. ``features`` are those of that grid.
        blocks: residual blocks of two convolutions at each level of the decoder, on the sum of tokens and detail; and a
            head of 3 voxels. So detail has a short way to the output. 0: one convolution on both side by side, a head
            of 1 voxel.
        norm: of the convolutions, as :class:`monai.networks.blocks.Convolution` takes it. Its ``eps`` is larger than
            usual, or the noise of a window full of air would be blown up to look like anatomy. None for restoration,
            where the level of the noise must not be normalised away.
        depths: the blocks (1 is the first) whose tokens the decoder sees; None: a third, two thirds and all of them.
        dim, depth, num_heads: of the encoder, in place of the preset's.

    Raises:
        ValueError: if ``patch_size`` is no power of 2 or 1, or too small to be folded, ``blocks`` is negative, a
        residual network's channels differ, ``noise_scaled`` has no residual, a depth is not in the encoder, or the
        encoder refuses its arguments.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        patch_size: Sequence[int] | int = 8,
        size: str = "tiny",
        features: int = 16,
        residual: bool = False,
        residual_scale: float = 1.0,
        noise_scaled: bool = False,
        folded: bool = False,
        blocks: int = 0,
        norm: str | tuple | None = ("exportable_instance", {"eps": 1e-3}),
        depths: Sequence[int] | None = None,
        dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        residual, noise_scaled, folded = map(str2bool, (residual, noise_scaled, folded))  # a command line has words
        if residual and in_channels != out_channels:
            raise ValueError(
                f"a residual network gives back the channels it gets: in_channels {in_channels} and out_channels "
                f"{out_channels} must be equal."
            )
        if noise_scaled and not residual:
            raise ValueError("noise_scaled scales the residual: it needs residual=True.")
        if blocks < 0:
            raise ValueError(f"blocks must be 0 or more, got {blocks}.")
        self.residual, self.noise_scaled = residual, noise_scaled
        self.summed = blocks > 0
        # the unit is part of the weights, by a name that weights of the other kind do not have
        units = {"noise_unit": noise_scaled, "intensity_unit": residual and not noise_scaled}
        for name, used in units.items():
            self.register_buffer(name, torch.tensor(float(residual_scale)), persistent=used)
        self.encoder = SSPFormerEncoder(spatial_dims, in_channels, patch_size, size, dim, depth, num_heads)
        strides = halvings(self.encoder.patch_size)
        self.folding = list(strides.pop(0)) if folded else [1] * spatial_dims
        if not strides:
            raise ValueError(f"folded needs patches that are halved twice or more, got patch_size {patch_size}.")
        n_blocks = len(self.encoder.blocks)
        self.depths = tuple(depths or sorted({-(-n_blocks * third // 3) for third in (1, 2, 3)}))
        if not all(1 <= depth <= n_blocks for depth in self.depths):
            raise ValueError(f"depths must be within 1 and {n_blocks}, the blocks of the encoder, got {self.depths}.")

        channels = [features * 2**level for level in range(len(strides) + 1)]  # the last: of the token grid

        def convolution(into: int, out: int, stride: Sequence[int] | int = 1) -> Convolution:
            return Convolution(
                spatial_dims,
                into,
                out,
                strides=stride,
                adn_ordering="NA",
                act="LEAKYRELU",
                norm=norm,
                bias=norm is None,
            )

        def plain(into: int, out: int, kernel: int) -> nn.Module:
            return (nn.Conv3d if spatial_dims == 3 else nn.Conv2d)(into, out, kernel, padding=kernel // 2)

        seen = in_channels * (2 if residual else 1) * math.prod(self.folding)
        self.stem = nn.ModuleList([convolution(seen, channels[0])])
        for level, stride in enumerate(strides[:-1]):
            narrow, wide = channels[level], channels[level + 1]
            self.stem.append(nn.Sequential(convolution(narrow, wide, stride), convolution(wide, wide)))

        self.token_norms = nn.ModuleList(nn.LayerNorm(self.encoder.dim) for _ in self.depths)
        self.token_projection = nn.Linear(self.encoder.dim * len(self.depths), channels[-1])
        transposed = nn.ConvTranspose3d if spatial_dims == 3 else nn.ConvTranspose2d
        self.upsample, self.fuse = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(strides))):
            narrow, wide = channels[level], channels[level + 1]
            self.upsample.append(transposed(wide, narrow, kernel_size=strides[level], stride=strides[level]))
            if blocks:
                refine = [Residual(convolution(narrow, narrow), plain(narrow, narrow, 3)) for _ in range(blocks)]
                self.fuse.append(nn.Sequential(*refine))
            else:
                self.fuse.append(convolution(2 * narrow, narrow))
        self.head = plain(channels[0], out_channels * math.prod(self.folding), 3 if blocks else 1)
        for module in (*self.stem.modules(), *self.fuse.modules()):
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):  # PyTorch's own start shrinks what no norm scales up again
                nn.init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")
        for module in self.fuse.modules():
            if isinstance(module, Residual):  # blocks start near the identity: no norm keeps a sum of many in bounds
                with torch.no_grad():
                    module.layers[-1].weight.mul_(0.1)
        if residual:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, in_channels, *S)``, any size -> ``(B, out_channels, *S)``: logits, or the restored image."""
        if not self.residual:
            return self.forward_dense(image, image)
        unit = self.residual_unit(image)
        detail = 2 * torch.asinh(finest_detail(image) / (2 * unit))
        return image + unit * self.forward_dense(image, torch.cat([image, detail.to(image.dtype)], dim=1))

    def forward_dense(self, image: Tensor, seen: Tensor) -> Tensor:
        """The head's output ``(B, out_channels, *S)``; ``seen``: what the convolutions see, on the image's grid."""
        tokens = self.forward_encoder(image)
        detail = self.forward_stem(pad_to_patches(seen, self.encoder.patch_size))
        out = self.forward_decoder(tokens, detail)
        for axis, side in enumerate(image.shape[2:], start=2):
            out = out.narrow(axis, 0, side)
        return out

    def residual_unit(self, image: Tensor) -> Tensor:
        """What the residual of an image ``(B, C, *S)`` counts in: a number a channel, ``(B, C, 1, ...)``, or one."""
        if self.noise_scaled:
            return self.noise_unit * noise_level(image).clamp(min=1e-4).to(image.dtype)  # a flat image has none
        return self.intensity_unit

    def forward_encoder(self, image: Tensor) -> Tensor:
        """Tokens of all ``depths``, projected, on their grid: ``(B, C, *grid)``."""
        hidden = self.encoder.hidden_tokens(image, self.depths)
        tokens = torch.cat([norm(hidden[i]) for i, norm in enumerate(self.token_norms)], dim=-1)
        return self.token_projection(tokens).transpose(1, 2).unflatten(2, self.encoder.grid(image.shape[2:]))

    def forward_stem(self, image: Tensor) -> list[Tensor]:
        """Detail on the full grid, or the folded one, ``(B, features, *S)``, and on each halved one, finest first."""
        detail, image = [], fold(image, self.folding)
        for stage in self.stem:
            image = stage(image)
            detail.append(image)
        return detail

    def forward_decoder(self, tokens: Tensor, detail: list[Tensor]) -> Tensor:
        """From the token grid up to the full one, ``(B, out_channels, *S)``."""
        for level, (upsample, fuse) in enumerate(zip(self.upsample, self.fuse), start=1):
            tokens, fine = upsample(tokens), detail[-level]
            tokens = fuse(tokens + fine if self.summed else torch.cat([tokens, fine], dim=1))
        return unfold(self.head(tokens), self.folding)


class Residual(nn.Module):
    """Layers whose output is added to their input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def finest_detail(image: Tensor) -> Tensor:
    """An image ``(B, C, *S)`` less its mean over 3 voxels along each axis; those at the ends are repeated. float32."""
    image = image.float()
    wider = F.pad(image, [1] * 2 * (image.ndim - 2), mode="replicate")
    if image.ndim == 5:
        return image - F.avg_pool3d(wider, kernel_size=3, stride=1)
    return image - F.avg_pool2d(wider, kernel_size=3, stride=1)


def fold(image: Tensor, factor: list[int]) -> Tensor:
    """Space to depth, ``(B, C, *S)`` to ``(B, C * prod(factor), *(S / factor))``; sides are multiples of the factor."""
    for i in range(len(factor)):
        if factor[i] > 1:
            places = [image.shape[2 + i] // factor[i], factor[i]]
            image = image.unflatten(2 + i, places).movedim(3 + i, 2).flatten(1, 2)
    return image


def unfold(image: Tensor, factor: list[int]) -> Tensor:
    """Inverse of :func:`fold`."""
    for i in range(len(factor) - 1, -1, -1):
        if factor[i] > 1:
            channels = [image.shape[1] // factor[i], factor[i]]
            image = image.unflatten(1, channels).movedim(2, 3 + i).flatten(2 + i, 3 + i)
    return image


def halvings(patch_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Strides that lead from voxels to tokens, finest first: 2 along each axis whose patch is not yet used up.

    >>> halvings((8, 8, 2))
    [(2, 2, 1), (2, 2, 1), (2, 2, 2)]
    """
    if max(patch_size) < 2 or any(patch < 1 or patch & (patch - 1) for patch in patch_size):
        raise ValueError(f"patch_size must be powers of 2, at least one above 1, got {tuple(patch_size)}.")
    levels = [patch.bit_length() - 1 for patch in patch_size]
    steps = max(levels)
    # an axis with a small patch has coarse voxels: it is halved last, when the others have caught up
    return [tuple(2 if step >= steps - n else 1 for n in levels) for step in range(steps)]
