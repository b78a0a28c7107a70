"""Networks: the SSPFormer encoder, the masked autoencoder that pretrains it, and the dense network of the tasks."""

from .dense import SSPFormerDense
from .encoder import SIZES, SSPFormerEncoder
from .masked_autoencoder import MaskedAutoencoder
from .pretrained import load_pretrained

__all__ = ["SIZES", "MaskedAutoencoder", "SSPFormerDense", "SSPFormerEncoder", "load_pretrained"]
