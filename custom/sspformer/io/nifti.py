"""Reading and writing NIfTI."""

from __future__ import annotations

import gzip
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import SaveImaged

from .errors import Unusable, by, without_ones
from .files import NIFTI_SUFFIX, output_path, replacing

__all__ = ["SaveLikeInputd", "read_nifti", "save_like"]


def read_nifti(path: str | Path, volume: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels ``(X, Y, Z)``, float32, of a NIfTI file or of one volume of a 4D file, and the affine to RAS mm."""
    image = nib.load(path)
    shape = without_ones(image.shape)
    if len(shape) != (3 if volume is None else 4):
        raise Unusable(
            f"its shape {by(shape)} is not 3D; a 4D file needs the item's 'volume', and only a 4D one has it"
        )
    voxels = image.dataobj if volume is None else image.dataobj[:, :, :, volume]
    return np.asarray(voxels, dtype=np.float32).reshape(shape[:3]), np.array(image.affine)


class SaveLikeInputd(SaveImaged):
    """Writes predictions as NIfTI with the conventions of the file that was read, see :func:`save_like`.

    It is a ``SaveImaged`` because MONAI Label leaves those out. MONAI's own makes a new header, does not round, names a
    DICOM series after its first slice, and leaves half a file when it is killed.

    Args:
        keys: predictions ``(1, X, Y, Z)``, MetaTensors with ``filename_or_obj`` of the file that was read.
        output_dir: gets ``<name>_<output_postfix>.nii.gz``; the name is the item's.
        output_postfix: see above.
        rounded: False: images are float32, whatever the type of the file.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, output_postfix: str = "seg", rounded: bool = True
    ) -> None:
        super().__init__(keys, output_dir=output_dir, output_postfix=output_postfix)
        self.output_dir, self.output_postfix, self.rounded = output_dir, output_postfix, rounded

    def path_of(self, item: Mapping[Hashable, Any]) -> Path:
        """Path of the file that is written for an item."""
        return output_path(item["name"], self.output_dir, self.output_postfix)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            save_like(d[key], self.path_of(d), self.rounded)
        return d


def save_like(volume: MetaTensor, path: str | Path, rounded: bool = True) -> None:
    """Write a volume as NIfTI, atomically, with the space and type of the file that was read (``filename_or_obj``).

    - Space: on the file's grid, the affine is kept bit by bit, with qform, sform and their codes. On another grid, both
      are adapted to it. Volumes from DICOM are in scanner coordinates.
    - Type: a label map (integers) is written as it is. An image is rounded and clipped to the type of the file if that
      is an integer type without a scale factor, and is float32 otherwise.

    Args:
        volume: ``(1, X, Y, Z)`` with affine to RAS mm.
        path: ends in ``.nii.gz``.
        rounded: False: every image is float32.
    """
    path, source = Path(path), str(volume.meta["filename_or_obj"])
    voxels = volume.as_tensor().detach().cpu().numpy()[0]
    affine = np.asarray(volume.affine.cpu(), dtype=np.float64)
    if is_image := voxels.dtype.kind == "f":
        voxels = voxels.astype(np.float32, copy=False)
    if NIFTI_SUFFIX.search(source):
        of_source = nib.load(source)
        header = of_source.header
        stored = header.get_data_dtype()
        unscaled = (of_source.dataobj.slope, of_source.dataobj.inter) == (1, 0)
        if is_image and rounded and unscaled and stored.kind in "iu":
            voxels = _rounded(voxels, stored)
        image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        header = image_class.header_class.from_header(header)
        header.extensions.clear()  # may hold a whole DICOM header, with the patient's name
        header["cal_min"] = header["cal_max"] = 0  # the display range does not hold for the result
        header.set_data_dtype(voxels.dtype)
        step = np.linalg.solve(of_source.affine, affine)  # from voxels of the new grid to voxels of the file
        if voxels.shape == of_source.shape[:3] and np.allclose(step, np.eye(4), atol=1e-4):
            image = image_class(voxels, of_source.affine, header)
        else:
            image = image_class(voxels, affine, header)
            qform, sform = int(header["qform_code"]), int(header["sform_code"])
            image.set_qform(header.get_qform() @ step if qform else affine, qform)
            image.set_sform(header.get_sform() @ step if sform else affine, sform or (0 if qform else "aligned"))
    else:
        image = nib.Nifti1Image(voxels, affine)
        image.set_qform(affine, "scanner")
        image.set_sform(affine, "scanner")
        image.header.set_xyzt_units("mm")

    with replacing(path) as part, gzip.open(part, "wb", compresslevel=1) as file:
        image.to_stream(file)


def _rounded(voxels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Nearest integers that the type can hold."""
    limits = np.iinfo(dtype)
    if dtype.itemsize > 2:
        voxels = voxels.astype(np.float64)  # float32 cannot hold the limits
    return np.clip(np.rint(voxels), limits.min, limits.max).astype(dtype)
