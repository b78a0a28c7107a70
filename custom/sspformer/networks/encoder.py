"""The SSPFormer encoder: a plain vision transformer for 2D and 3D images of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from .layers import Block, RotaryPosition, gather_tokens, pad_to_patches, patchify, select_positions, token_grid

__all__ = ["SIZES", "SSPFormerEncoder"]

#: name: encoder width, depth, heads; decoder width, depth, heads of the masked autoencoder
SIZES = {
    "tiny": {"dim": 256, "depth": 6, "num_heads": 4, "decoder_dim": 192, "decoder_depth": 2, "decoder_num_heads": 3},
    "small": {"dim": 384, "depth": 12, "num_heads": 6, "decoder_dim": 256, "decoder_depth": 4, "decoder_num_heads": 4},
    "base": {"dim": 768, "depth": 12, "num_heads": 12, "decoder_dim": 384, "decoder_depth": 4, "decoder_num_heads": 6},
}


def size_preset(size: str) -> dict[str, int]:
    """The row of :data:`SIZES` called ``size``; raises on any other name."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}.")
    return dict(SIZES[size])


class SSPFormerEncoder(nn.Module):
    """Vision transformer encoder (Dosovitskiy et al., arXiv 2010.11929) with rotary positions, pre-norm blocks.

    Position enters only through the rotation of queries and keys, and images whose sides are no multiples of the patch
    are padded inside, so one set of weights serves every image size.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        patch_size: voxels along each spatial axis, or one number for all.
        size: preset of width, depth and heads: "tiny" (about 5 M parameters), "small" (21 M) or "base" (85 M).
        dim: channels of the tokens, in place of the preset's.
        depth: number of blocks, in place of the preset's.
        num_heads: attention heads, in place of the preset's.

    Raises:
        ValueError: if ``size`` is unknown, ``spatial_dims`` is neither 2 nor 3, or ``dim`` does not divide by
        ``num_heads``.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        patch_size: Sequence[int] | int = 8,
        size: str = "tiny",
        dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        preset = size_preset(size)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.patch_size = ensure_tuple_rep(patch_size, spatial_dims)
        self.dim = dim or preset["dim"]
        depth = depth or preset["depth"]
        num_heads = num_heads or preset["num_heads"]

        voxels = math.prod(self.patch_size) * in_channels
        self.patch_embedding = nn.Linear(voxels, self.dim)
        self.position = RotaryPosition(self.dim // num_heads, spatial_dims)
        self.blocks = nn.ModuleList(Block(self.dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(self.dim)
        self.apply(init_weights)
        # so that a file says what its weights are for: the shapes of the others do not tell 8 x 8 from 4 x 4 x 4 voxels
        self.register_buffer("layout", torch.tensor([num_heads, in_channels, *self.patch_size]))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        own = self.layout.tolist()
        layout = state_dict.setdefault(f"{prefix}layout", self.layout).tolist()  # files of before there was one
        if len(layout) == len(own) and layout != own:  # other numbers of dimensions are of another shape
            state_dict[f"{prefix}layout"] = self.layout  # it says what this network is, whatever is loaded
            *_, errors = args
            errors.append(
                f"{prefix}layout: the weights are of {layout[0]} attention heads, {layout[1]} channels and patches of "
                f"{layout[2:]}, the network of {own[0]}, {own[1]} and {own[2:]}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def grid(self, image_size: list[int]) -> list[int]:
        """Token grid of an image: ``ceil(S / patch_size)``."""
        return token_grid(image_size, self.patch_size)

    def forward(self, image: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode all patches, or the visible ones only.

        Args:
            image: ``(B, in_channels, *S)``.
            ids_keep: indices of the visible tokens ``(B, K)``; None: all.

        Returns:
            Tokens ``(B, K, dim)``, or ``(B, N, dim)`` without ``ids_keep``.
        """
        tokens, rotation = self.embed(image, ids_keep)
        for block in self.blocks:
            tokens = block(tokens, rotation)
        return self.norm(tokens)

    def hidden_tokens(self, image: Tensor, depths: list[int]) -> list[Tensor]:
        """Tokens ``(B, N, dim)`` after each of the blocks ``depths`` (1 is the first); the last block's are normalised
        as in :meth:`forward`."""
        tokens, rotation = self.embed(image)
        hidden: dict[int, Tensor] = {}
        for depth, block in enumerate(self.blocks, start=1):
            if depth <= max(depths):
                tokens = block(tokens, rotation)
                hidden[depth] = tokens
        if max(depths) == len(self.blocks):
            hidden[len(self.blocks)] = self.norm(tokens)
        return [hidden[depth] for depth in depths]

    def embed(self, image: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patches to tokens ``(B, K, dim)``, and their rotations; see :meth:`forward`."""
        self._check(image)
        patches = patchify(pad_to_patches(image, self.patch_size), self.patch_size)
        rotation = self.position(self.grid(image.shape[2:]))
        if ids_keep is not None:  # masked patches are dropped before anything is computed from them
            patches = gather_tokens(patches, ids_keep)
            rotation = select_positions(rotation, ids_keep)
        return self.patch_embedding(patches), rotation

    def _check(self, image: Tensor) -> None:
        if image.ndim != 2 + self.spatial_dims or image.shape[1] != self.in_channels:
            sides = "H, W, D"[: 3 * self.spatial_dims - 2]
            raise ValueError(
                f"the encoder takes images of shape (B, {self.in_channels}, {sides}), got {list(image.shape)}: "
                "build it with the in_channels and spatial_dims of your images."
            )


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, as in the masked autoencoder of He et al. (arXiv 2111.06377)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
