"""Networks: encoders, the masked autoencoders that pretrain them, and the networks of the tasks."""

from .dense import SSPFormerDense
from .encoder import SIZES, Encoder, SSPFormerEncoder, resize_patch_embedding
from .exported import ExportedNetwork, export_network, is_exported, network_to_run, place, save_exported
from .heads import ScanPredictor
from .layers import (
    Attention,
    Block,
    InstanceNorm,
    RotaryPosition,
    gather_patches,
    gather_tokens,
    pad_to_patches,
    patchify,
    token_grid,
    unpatchify,
)
from .masked_autoencoder import MaskedAutoencoder
from .masked_dense import MaskedDense
from .pretrained import load_pretrained, load_weights, read_weights
from .restorer import SSPFormerRestorer
