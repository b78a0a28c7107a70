"""Reads the items of a datalist."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import SpaceKeys

from .dicom_in import read_dicom
from .errors import Unusable, reason_of
from .files import printable
from .nifti import read_nifti


def is_series(image: str | os.PathLike | Sequence[str]) -> bool:
    """Whether an item's image is the list of a DICOM series' files, and not the path of one file."""
    return not isinstance(image, (str, os.PathLike))


def files_of(image: str | os.PathLike | Sequence[str]) -> list[Path]:
    """The files of an item's image."""
    return [Path(file) for file in (image if is_series(image) else [image])]


class LoadScand(MapTransform):
    """Reads the items of `prepare_datalist`, `prepare_pairs` and `find_inputs`.

    Each key holds the path of a NIfTI file or the list of the files of a DICOM series, or of one enhanced file. It
    becomes a MetaTensor (1, X, Y, Z) float32 with the affine from voxels to RAS mm, as MONAI's NibabelReader gives it.
    "volume" in an item chooses a volume of its 4D file. DICOM slices are put in order and rescaled. A "label" is
    rounded: a file with a scale factor may hold 0.99999 for class 1, which a cast to an integer type would cut to 0.

    Args:
        keys: entries to read.
        allow_missing_keys: do not raise if a key is missing.

    Raises:
        ValueError: naming a file that cannot be read or holds NaN or infinite voxels, and the reason.
    """

    def __init__(self, keys: KeysCollection = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        item = dict(data)
        for key in self.key_iterator(item):
            volume = self._load(item[key], item.get("volume"))
            item[key] = volume.round() if key == "label" else volume
        return item

    @staticmethod
    def _load(image: str | Path | Sequence[str], volume: int | None) -> MetaTensor:
        series = is_series(image)
        name = str(image[0] if series else image)
        try:
            voxels, affine = read_dicom(image)[:2] if series else read_nifti(image, volume)
            if broken := voxels.size - np.count_nonzero(np.isfinite(voxels)):
                raise Unusable(f"{broken} voxels are NaN or infinite")
        except Exception as error:
            where = os.path.dirname(name) if series and len(image) > 1 else name
            raise ValueError(f"cannot read the scan {printable(where)}: {reason_of(error)}") from error
        meta = {
            "filename_or_obj": name,
            "original_affine": affine.copy(),
            "spatial_shape": np.array(voxels.shape),
            "space": SpaceKeys.RAS,
            "original_channel_dim": float("nan"),  # MONAI's "no_channel"
        }
        return MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine), meta=meta)
