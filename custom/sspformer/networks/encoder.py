"""Encoders: what the networks ask of one, and SSPFormer's, a vision transformer for 2D and 3D images of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from .layers import (
    Block,
    LayerNorm,
    RotaryPosition,
    gather_patches,
    pad_to_patches,
    patchify,
    select_positions,
    token_grid,
)


class Encoder(Protocol):
    """What the networks ask of an encoder, a ``torch.nn.Module``; MONAI's ``ViT`` needs an adapter of 30 lines.

    An image ``(B, in_channels, *S)`` becomes ``N`` tokens, one for each patch, the last axis of the grid fastest. Sides
    that are no multiples of the patch are padded at their end, as :func:`sspformer.networks.pad_to_patches` does.

    An encoder may also have ``fit_weights(state)``, which :func:`sspformer.networks.load_pretrained` calls with the
    encoder's tensors in a file: see :meth:`SSPFormerEncoder.fit_weights`. Without it a file must hold every tensor of
    the encoder, by the same name and of the same shape.

    Attributes:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        patch_size: voxels along each spatial axis.
        dim: channels of a token.
        blocks: the layers in order, for layer-wise learning rates and the depths that a decoder sees.
        norm: what the last block's output goes through.
    """

    spatial_dims: int
    in_channels: int
    patch_size: tuple[int, ...]
    dim: int
    blocks: nn.ModuleList
    norm: nn.Module

    def grid(self, image_size: list[int]) -> list[int]:
        """Tokens along each axis of an image of these sides: ``ceil(S / patch_size)``."""

    def forward(self, image: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Normalised tokens of all patches ``(B, N, dim)``; or of the visible ones ``ids_keep`` (B, K) alone,
        ``(B, K, dim)``, computed from nothing else."""

    def hidden_tokens(self, image: Tensor, depths: list[int], ids_keep: Tensor | None = None) -> list[Tensor]:
        """Tokens ``(B, N, dim)`` after each of the blocks ``depths``; 1 is the first, the last one's are normalised.
        Only :class:`sspformer.networks.MaskedDense` asks for the visible ones, as in :meth:`forward`."""


#: name: width, depth and attention heads of the encoder, then those of the masked autoencoder's decoder
SIZES = {
    "tiny": {"dim": 256, "depth": 6, "num_heads": 4, "decoder_dim": 192, "decoder_depth": 2, "decoder_num_heads": 3},
    "small": {"dim": 384, "depth": 12, "num_heads": 6, "decoder_dim": 256, "decoder_depth": 4, "decoder_num_heads": 4},
    "base": {"dim": 768, "depth": 12, "num_heads": 12, "decoder_dim": 384, "decoder_depth": 4, "decoder_num_heads": 6},
}


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
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}.")
        preset = SIZES[size]
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
        self.norm = LayerNorm(self.dim)
        self.apply(init_weights)
        # a file says so what its weights are for: the other shapes do not tell 8 x 8 voxels from 4 x 4 x 4
        self.register_buffer("layout", torch.tensor([num_heads, in_channels, *self.patch_size]))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        own = self.layout.tolist()
        layout = state_dict.setdefault(f"{prefix}layout", self.layout).tolist()  # the first files had none
        if len(layout) == len(own) and layout != own:  # other numbers of dimensions are of another shape
            state_dict[f"{prefix}layout"] = self.layout  # it says what this network is, whatever is loaded
            *_, errors = args
            errors.append(
                f"{prefix}layout: the weights are of {layout[0]} attention heads, {layout[1]} channels and patches of "
                f"{layout[2:]}, the network of {own[0]}, {own[1]} and {own[2:]}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit_weights(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors of an SSPFormer encoder as this one can load them: the patch embedding is resized to its patch.

        Args:
            state: tensors of a file, without a prefix.

        Returns:
            The tensors; and for each that had to be changed, how.

        Raises:
            ValueError: if this is no SSPFormer encoder, or one of another width, depth, number of attention heads or
                of axes; the message goes on after "it".
        """
        embedding, first = "patch_embedding.weight", "blocks.0.attention.q.weight"
        if embedding not in state or first not in state:
            other = next((name for name in state if "blocks" in name), next(iter(state), None))
            raise ValueError(
                f"holds no SSPFormer encoder: it has {other!r}, but not both {embedding!r} and {first!r}; another "
                "project's blocks cannot be renamed into these, give an encoder.pt that configs/pretrain.json wrote."
            )
        dim, depth = len(state[embedding]), len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        if (dim, depth) != (self.dim, len(self.blocks)):
            preset = [name for name, row in SIZES.items() if (row["dim"], row["depth"]) == (dim, depth)]
            fix = f"size {preset[0]!r}" if preset else f"dim={dim} and depth={depth}"
            raise ValueError(
                f"has an encoder of width {dim} and {depth} blocks, the network one of width {self.dim} and "
                f"{len(self.blocks)} blocks: build the network's encoder with {fix}."
            )
        own = self.layout.tolist()
        if "layout" not in state:  # the first files had none
            return {**state, "layout": self.layout}, {}
        heads, *shape = state["layout"].int().tolist()
        if len(shape) != len(own) - 1:
            raise ValueError(
                f"has an encoder of {len(shape) - 1}D images, the network one of {self.spatial_dims}D: 2D weights do "
                "not fit 3D, nor 3D ones 2D, so pretrain with the spatial_dims of the network."
            )
        if heads != own[0]:
            raise ValueError(
                f"has an encoder of {heads} attention heads, the network one of {own[0]}: build the network's encoder "
                f"with num_heads={heads}."
            )
        if shape == own[1:]:
            return state, {}
        resized = resize_patch_embedding(state[embedding], shape, own[1:])
        change = f"{_patch_as_text(shape)} in the file, {_patch_as_text(own[1:])} here"
        return {**state, "layout": self.layout, embedding: resized}, {embedding: change}

    def grid(self, image_size: list[int]) -> list[int]:
        """Tokens along each axis of an image: ``ceil(S / patch_size)``."""
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

    def hidden_tokens(self, image: Tensor, depths: list[int], ids_keep: Tensor | None = None) -> list[Tensor]:
        """Tokens ``(B, N, dim)`` after each of the blocks ``depths`` (1 is the first); the last block's are normalised
        as in :meth:`forward`. With ``ids_keep`` of the visible patches alone, ``(B, K, dim)``."""
        tokens, rotation = self.embed(image, ids_keep)
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
        if image.ndim != 2 + self.spatial_dims or image.shape[1] != self.in_channels:
            sides = "H, W, D"[: 3 * self.spatial_dims - 2]
            raise ValueError(
                f"the encoder takes images of shape (B, {self.in_channels}, {sides}), got {list(image.shape)}: "
                "build it with the in_channels and spatial_dims of your images."
            )
        padded = pad_to_patches(image, self.patch_size)
        if ids_keep is None:
            tokens = self.patch_embedding(patchify(padded, self.patch_size))
        else:  # masked patches are dropped before anything is computed from them
            tokens = self.patch_embedding(gather_patches(padded, self.patch_size, ids_keep))
        rotation = self.position(self.grid(image.shape[2:])).to(tokens.dtype)  # once for all blocks
        return tokens, rotation if ids_keep is None else select_positions(rotation, ids_keep)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, as in the masked autoencoder of He et al. (arXiv 2111.06377)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def resize_patch_embedding(weight: Tensor, shape: Sequence[int], new_shape: Sequence[int]) -> Tensor:
    """Patch embedding for patches of another size or number of channels.

    Size: a patch is resized (linear, antialiased) to the size that ``weight`` was made for, and has the token that
    ``weight`` gives then. The idea is that of FlexiViT (Beyer et al., arXiv 2212.08013), which inverts the opposite
    resize instead. When patches shrink, that keeps less of the token of a smooth image.
    Channels: 1 to n repeats the weights and divides them by n, n to 1 sums them, so that an image repeated in n
    channels gives the token of the one.

    Args:
        weight: ``(dim, channels * prod(patch))``, in the order of :func:`sspformer.networks.patchify`.
        shape: ``(channels, *patch)`` of ``weight``.
        new_shape: ``(channels, *patch)`` wanted.

    Raises:
        ValueError: if the numbers of channels differ, and neither is 1.
    """
    channels, new_channels = shape[0], new_shape[0]
    if channels != new_channels and 1 not in (channels, new_channels):
        raise ValueError(
            f"has an encoder of {channels} channels, the network in_channels {new_channels}: which belong together is "
            "unknown, take an encoder of 1 channel or of as many as the network's."
        )
    weight = weight.float().unflatten(1, tuple(shape))  # dim C p0 p1 ...
    if channels != new_channels:
        weight = weight.sum(1, keepdim=True).repeat_interleave(new_channels, dim=1) / new_channels
    for axis, (side, new_side) in enumerate(zip(shape[1:], new_shape[1:]), start=2):
        if side != new_side:
            eye = torch.eye(new_side)[None, None]
            resize = F.interpolate(eye, size=(side, new_side), mode="bilinear", antialias=True)[0, 0]
            weight = torch.tensordot(weight, resize, dims=([axis], [0])).movedim(-1, axis)
    return weight.flatten(1)


def _patch_as_text(shape: Sequence[int]) -> str:
    """``(1, 8, 8, 4)`` -> "1 channel of 8 x 8 x 4 voxels"."""
    return f"{shape[0]} channel{'s' * (shape[0] > 1)} of {' x '.join(map(str, shape[1:]))} voxels"
