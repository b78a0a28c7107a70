"""Reading and writing NIfTI."""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import SaveImaged

from ..geometry import grid_problem
from .errors import Unusable, check_size, size_text, without_ones
from .files import NIFTI_SUFFIX, output_path, replacing
from .formats import foreign_content, no_file

GZIP_RATIO = 1032  # deflate packs no more bytes into one
UNITS = {1: ("metre", 1000.0), 3: ("micron", 0.001)}  # codes of xyzt_units, in mm; all others mean mm
VECTOR_INTENTS = {1005: "symmetric matrices", 1006: "a displacement field", 1007: "vectors", 2003: "colours"}
IMAGE_INTENTS = {0, 1001, 1011, 2001}  # none, estimates, without a dimension, time series


def check_intent(image: nib.Nifti1Pair) -> None:
    """Raises `Unusable` for what the header says is no image: statistics, labels, vectors, warps, colours."""
    code = int(image.header["intent_code"])
    if code not in IMAGE_INTENTS and code in nib.nifti1.intent_codes:
        raise Unusable(f"no image but {nib.nifti1.intent_codes.label[code].strip()!r} by its header (intent {code})")


def read_nifti(path: str | Path, volume: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels ``(X, Y, Z)``, float32, of a NIfTI file or of one volume of a 4D file, and the affine to RAS mm.

    Raises:
        Unusable: as `check_header`, and when a gzip file does not agree with its check sum.
    """
    with open_nifti(Path(path)) as (image, grid):
        shape = without_ones(image.shape)
        if len(shape) != (3 if volume is None else 4):
            raise Unusable(
                f"its shape {size_text(shape)} is not 3D; a 4D file needs the item's 'volume', and only a 4D one has it"
            )
        voxels = image.dataobj if volume is None else image.dataobj[:, :, :, volume]
        voxels = np.asarray(voxels, dtype=np.float32).reshape(shape[:3])
    return voxels, np.array(grid["affine"])


@contextlib.contextmanager
def open_nifti(path: Path, min_size: int = 2) -> Iterator[tuple[nib.Nifti1Pair, dict]]:
    """The image and its grid, see `check_header`; its voxels are to be read within the context.

    A gzip file is unpacked once, from its beginning to its end, which also verifies its check sum.
    """
    image, grid = check_header(path, min_size)
    if path.suffix.lower() != ".gz":
        yield image, grid
        return
    with gzip.open(path, "rb") as file:
        yield type(image).from_stream(file), grid
        while file.read(1 << 20):
            pass


def check_header(path: Path, min_size: int = 2) -> tuple[nib.Nifti1Pair, dict]:
    """The image of a NIfTI file, and its grid by its header (see `check_grid`); no voxel is read.

    Args:
        path: of the file, or of one of a pair .hdr and .img.
        min_size: fewest voxels along each side.

    Raises:
        Unusable: with the reason, when this is not a volume, or series of volumes, of real numbers on a valid grid, or
            when it claims more voxels than the file can hold.
    """
    files = [path]
    if path.suffix.lower() in (".hdr", ".img"):
        files = [path.with_suffix(".hdr"), path.with_suffix(".img")]
        path = files[0]
    for file in files:
        if what := no_file(file):
            raise Unusable(what)
        if not file.stat().st_size:
            raise Unusable("empty file (0 bytes)")
    compressed = path.suffix.lower() == ".gz"
    with open(path, "rb") as file:
        head = file.read(348)
    if compressed:
        if not head.startswith(b"\x1f\x8b"):
            raise Unusable(foreign_content(head) or "not gzip-compressed although named .gz")
        with gzip.open(path, "rb") as file:
            head = file.read(348)
    if what := foreign_content(head):
        raise Unusable(f"not a NIfTI file although named so, but {what}")
    if len(head) < 348:
        raise Unusable("not a NIfTI file although named so (too short for a header)")
    try:
        image = nib.load(path)
        if not isinstance(image, (nib.Nifti1Pair, nib.Nifti2Pair)):
            if isinstance(image, nib.AnalyzeImage):
                raise Unusable("Analyze 7.5, not NIfTI: its orientation is unknown")
            raise Unusable(f"not a volume in NIfTI format but a {type(image).__name__}")
        with (gzip.open if compressed else open)(path, "rb") as file:
            raw = image.header_class.from_fileobj(file, check=False)  # nibabel's check would replace zero spacing
        offset = image.dataobj.offset
    except (nib.spatialimages.HeaderDataError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise error if isinstance(error, Unusable) else Unusable(f"corrupt NIfTI header: {error}") from error

    shape = without_ones(image.shape)
    if min(shape, default=0) < 1:
        raise Unusable(f"corrupt NIfTI header: its shape is {size_text(shape)}")
    dtype = image.get_data_dtype()
    if dtype.names or dtype.kind not in "iufb":
        kind = "complex numbers" if dtype.kind == "c" else "a colour image (RGB)" if dtype.names else str(dtype)
        raise Unusable(f"voxels are {kind}, not one real number each")
    intent = int(image.header["intent_code"])
    if len(shape) > 4 or (len(shape) == 4 and intent in VECTOR_INTENTS):
        raise Unusable(f"{len(shape)}D data (shape {size_text(shape)}: {VECTOR_INTENTS.get(intent, 'vectors')}?)")
    check_size(shape, min_size)
    claimed, held = offset + math.prod(shape) * dtype.itemsize, files[-1].stat().st_size
    if claimed > held * (GZIP_RATIO if compressed else 1):
        raise Unusable(
            f"truncated or corrupt: its header claims {size_text(shape)} voxels ({claimed:,} bytes), and the file has "
            f"only {held:,} bytes{', compressed' if compressed else ''}"
        )
    unit, factor = mm_per_unit(image)
    affine = affine_in_mm(image)
    spacing = nib.affines.voxel_sizes(affine)
    if int(raw["sform_code"]) == 0:  # then the affine comes from the spacing in the header
        spacing = np.abs(raw["pixdim"][1:4]) * factor
    return image, check_grid(shape, affine, spacing, unit)


def mm_per_unit(image: nib.Nifti1Pair) -> tuple[str, float]:
    """The unit of length of a file (xyzt_units) and how many mm it is; mm where it says none."""
    return UNITS.get(int(image.header["xyzt_units"]) & 7, ("mm", 1.0))


def affine_in_mm(image: nib.Nifti1Pair) -> np.ndarray:
    """The affine from voxels to RAS mm, whatever the unit of the file."""
    affine = np.array(image.affine)
    affine[:3] *= mm_per_unit(image)[1]
    return affine


def check_grid(shape: Sequence[int], affine: np.ndarray, spacing: np.ndarray | None = None, unit: str = "mm") -> dict:
    """The grid of a scan, whatever its format: shape, spacing in mm, orientation and affine to RAS mm.

    Args:
        shape: voxels along each axis.
        affine: to RAS mm.
        spacing: in mm; None: that of the affine.
        unit: of the file.

    Raises:
        Unusable: when the geometry cannot be, see :mod:`sspformer.geometry`.
    """
    spacing = nib.affines.voxel_sizes(affine) if spacing is None else spacing
    if problem := grid_problem(shape, affine, spacing, unit):
        raise Unusable(problem)
    return {
        "shape": [int(n) for n in shape[:3]],
        "spacing": [float(s) for s in spacing],
        "orientation": "".join(axis or "?" for axis in nib.aff2axcodes(affine)),
        "affine": affine.tolist(),
    }


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

    - Space: on the file's grid, the affine is kept bit by bit, with qform, sform, codes and unit. On another grid,
      both are adapted to it. Volumes from DICOM are in scanner coordinates.
    - Type: a label map (integers) is written as it is. An image is rounded and clipped to the type of the file if that
      is an integer type without a scale factor, and is float32 otherwise.

    Args:
        volume: ``(1, X, Y, Z)`` with affine to RAS mm.
        path: ends in ``.nii.gz``.
        rounded: False: every image is float32.
    """
    path, source = Path(path), str(volume.meta["filename_or_obj"])
    voxels = volume.as_tensor().detach().cpu().numpy()[0]
    affine = np.array(volume.affine.cpu(), dtype=np.float64)  # a copy
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
        # from voxels of the new grid to voxels of the file
        step = np.linalg.solve(affine_in_mm(of_source), affine)
        if voxels.shape == of_source.shape[:3] and np.allclose(step, np.eye(4), atol=1e-4):
            image = image_class(voxels, of_source.affine, header)
        else:
            affine[:3] /= mm_per_unit(of_source)[1]  # in the file's unit
            image = image_class(voxels, affine, header)
            qform, sform = int(header["qform_code"]), int(header["sform_code"])
            image.set_qform(header.get_qform() @ step if qform else affine, qform)
            image.set_sform(header.get_sform() @ step if sform else affine, sform or (0 if qform else "aligned"))
    else:
        image = nib.Nifti1Image(voxels, affine)
        image.set_qform(affine, "scanner")
        image.set_sform(affine, "scanner")
        image.header.set_xyzt_units("mm")

    with replacing(path) as part, part.open("wb") as raw, gzip.GzipFile("", "wb", 1, raw) as file:  # without its name
        image.to_stream(file)


def _rounded(voxels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Nearest integers that the type can hold."""
    limits = np.iinfo(dtype)
    if dtype.itemsize > 2:
        voxels = voxels.astype(np.float64)  # float32 cannot hold the limits
    return np.clip(np.rint(voxels), limits.min, limits.max).astype(dtype)
