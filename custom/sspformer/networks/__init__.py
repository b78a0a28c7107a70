"""Networks: the SSPFormer encoder, the masked autoencoder that pretrains it, and the dense network of the tasks."""

from .dense import SSPFormerDense
from .encoder import SIZES, SSPFormerEncoder
from .layers import (
    Attention,
    Block,
    InstanceNorm,
    RotaryPosition,
    gather_tokens,
    pad_to_patches,
    patchify,
    token_grid,
    unpatchify,
)
from .masked_autoencoder import MaskedAutoencoder
from .pretrained import load_pretrained, resize_patch_embedding

__all__ = [
    "Attention",
    "Block",
    "InstanceNorm",
    "MaskedAutoencoder",
    "RotaryPosition",
    "SIZES",
    "SSPFormerDense",
    "SSPFormerEncoder",
    "gather_tokens",
    "load_pretrained",
    "pad_to_patches",
    "patchify",
    "resize_patch_embedding",
    "token_grid",
    "unpatchify",
]
