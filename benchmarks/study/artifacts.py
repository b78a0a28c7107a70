"""TorchIO's artifacts on MONAI's images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import optional_import


class TorchIOd(MapTransform):
    """A transform of TorchIO (Perez-Garcia et al., CMPB 208:106236, 2021), drawn from PyTorch's global generator.

    MONAI's ``RandTorchIOd`` loses the affine where the transform resamples; here the image keeps it.

    Args:
        keys: images ``(C, *S)``.
        name: of the transform.
        options: of the transform.
    """

    def __init__(self, keys: KeysCollection, name: str, **options) -> None:
        super().__init__(keys)
        transforms, _ = optional_import("torchio.transforms")
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        self.transform = getattr(transforms, name)(**options)

    def __call__(self, data: Mapping) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key].clone()
            image[:] = self.transform(torch.as_tensor(d[key]).as_subclass(torch.Tensor).float())
            d[key] = image
        return d
