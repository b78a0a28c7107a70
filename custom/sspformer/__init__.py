"""SSPFormer for MONAI: self-supervised pretraining of a transformer on MRI, and what a MONAI bundle needs of it.

The method: ``transforms.masking``, ``transforms.noise``, ``networks`` and ``losses``, on top of ``kspace``.
Around it: ``engines`` (the tie into MONAI), ``data`` (which scans a data set holds), ``io`` (NIfTI and DICOM),
``metrics``, ``pictures`` and ``compat`` (what works around MONAI). Imports run in one direction: engines know networks,
transforms and data; networks and transforms know no files; nothing knows a config.
"""

__version__ = "0.5.0"

# MONAI Label has the bundle on sys.path only while it parses the config, so everything is imported here.
from . import (
    compat,
    data,
    demo,
    engines,
    intensity,
    io,
    kspace,
    losses,
    metrics,
    networks,
    options,
    pictures,
    transforms,
)
