"""Networks: the SSPFormer encoder and the masked autoencoder that pretrains it."""

from .encoder import SIZES, SSPFormerEncoder
from .masked_autoencoder import MaskedAutoencoder

__all__ = ["SIZES", "MaskedAutoencoder", "SSPFormerEncoder"]
