"""SSPFormer for MONAI: self-supervised pretraining of a transformer on MRI, and what a MONAI bundle needs of it.

The parts, by what they know: ``kspace`` (Fourier conventions, physical frequency), ``transforms`` (masking and noise),
``networks``, ``losses``; ``pretraining``, ``finetuning``, ``restoration``, ``evaluation``, ``inference``, ``handlers``
(the tie into MONAI's engines); ``visualize``, ``data`` (scans on disk), ``dicom`` (results as such), ``demo``.
"""

__version__ = "0.4.0"

# A bundle's config imports this package while its folder is on sys.path, in some clients for that moment only: so
# import it all here.
from . import (
    data,
    demo,
    dicom,
    evaluation,
    finetuning,
    handlers,
    inference,
    kspace,
    losses,
    networks,
    pretraining,
    restoration,
    transforms,
    visualize,
)

__all__ = [
    "data",
    "demo",
    "dicom",
    "evaluation",
    "finetuning",
    "handlers",
    "inference",
    "kspace",
    "losses",
    "networks",
    "pretraining",
    "restoration",
    "transforms",
    "visualize",
]
