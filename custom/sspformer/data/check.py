"""What makes a scan unusable: each is read once, to its end, and the result kept for the next run."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from ..io.dicom_in import read_dicom
from ..io.errors import Unusable, by, check_size, without_ones
from ..io.files import digest, stats, write_atomically

__all__ = ["Cache", "check_dicom", "check_header", "check_label", "check_nifti", "in_threads"]

logger = logging.getLogger("sspformer")

CHECK_VERSION = 4  # raise it whenever the check below changes, so that results cached by an older one are not used


NIFTI_VECTOR_INTENTS = {1005: "symmetric matrices", 1006: "a displacement field", 1007: "vectors", 2003: "colours"}


def check_nifti(files: list[Path], min_size: int) -> dict:
    """Reads a NIfTI file to its last byte; returns its grid (see `check_header`) and, if 4D, its usable volumes."""
    grid, image, voxels = _read_nifti(files, min_size)
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    four = len(without_ones(image.shape)) == 4
    ranges = [_value_range(voxels[:, :, :, i]) for i in range(image.shape[3])] if four else [_value_range(voxels)]
    _value_range(np.array(ranges) * slope + intercept)
    varied = [i for i, (low, high) in enumerate(ranges) if low < high and slope != 0]
    if not varied:
        raise Unusable("all voxels have the same value")
    return grid | ({"volumes": varied} if four else {})


def check_label(files: list[Path]) -> dict:
    """Reads a label map to its last byte; returns its grid (see `check_header`) and the voxels of each value in it.

    Raises `Unusable` when it is no NIfTI file of one volume, or has a value that is not an integer.
    """
    grid, image, voxels = _read_nifti(files, min_size=2)
    if len(shape := without_ones(image.shape)) > 3:
        raise Unusable(f"4D (shape {by(shape)}): a label map is one volume of class numbers")
    values, counts = np.unique(voxels, return_counts=True)
    slope = float(image.dataobj.slope)
    values = values * slope + float(image.dataobj.inter)
    stored_whole = np.issubdtype(image.get_data_dtype(), np.integer)  # then to half a step of the scale
    tolerance = max(1e-4, min(0.1, 0.51 * abs(slope))) if stored_whole else 1e-4
    whole = np.isfinite(values) & (np.abs(values - np.round(values)) < tolerance)
    if not whole.all():
        examples = ", ".join(f"{value:.7g}" for value in values[~whole][:3])
        raise Unusable(f"its values are not integers (such as {examples}), so it is not a map of class numbers")
    return grid | {"values": {str(int(v)): int(n) for v, n in zip(np.round(values), counts, strict=True)}}


def check_header(files: list[Path], min_size: int) -> dict:
    """What the header of a NIfTI file says, without its voxels: shape, spacing in mm, orientation, affine to RAS mm.

    Args:
        files: the NIfTI file, or the .hdr and .img of a pair.
        min_size: fewest voxels along each side.

    Raises:
        Unusable: with the reason, when this is not a volume, or series of volumes, of real numbers on a valid grid.
    """
    path = files[0]
    if not all(file.stat().st_size for file in files):
        raise Unusable("empty file (0 bytes)")
    compressed = path.suffix.lower() == ".gz"
    with open(path, "rb") as raw:
        if compressed and raw.read(2) != b"\x1f\x8b":
            raise Unusable("not gzip-compressed although named .gz")
    open_file = gzip.open if compressed else open
    with open_file(path, "rb") as file:
        if len(file.read(348)) < 348:
            raise Unusable("not a NIfTI file although named so (too short for a header)")
        image = nib.load(path)
        if not isinstance(image, (nib.Nifti1Pair, nib.Nifti2Pair)):
            if isinstance(image, nib.AnalyzeImage):
                raise Unusable("Analyze 7.5, not NIfTI: its orientation is unknown")
            raise Unusable(f"not a volume in NIfTI format but a {type(image).__name__}")
        file.seek(0)
        raw_header = image.header_class.from_fileobj(file, check=False)  # a checked one has zero spacing mended

    shape = without_ones(image.shape)
    dtype = image.get_data_dtype()
    if dtype.names or dtype.kind not in "iufb":
        kind = "complex numbers" if dtype.kind == "c" else "a colour image (RGB)" if dtype.names else str(dtype)
        raise Unusable(f"voxels are {kind}, not one real number each")
    intent = int(image.header["intent_code"])
    if len(shape) > 4 or (len(shape) == 4 and intent in NIFTI_VECTOR_INTENTS):
        raise Unusable(f"{len(shape)}D data (shape {by(shape)}: {NIFTI_VECTOR_INTENTS.get(intent, 'vectors')}?)")
    check_size(shape, min_size)
    spacing = nib.affines.voxel_sizes(image.affine)
    if int(raw_header["sform_code"]) == 0:  # then the affine comes from the spacing in the header
        spacing = np.abs(raw_header["pixdim"][1:4])
    if not np.isfinite(image.affine).all() or not np.isfinite(spacing).all() or min(spacing) <= 0:
        raise Unusable(f"zero or non-finite voxel spacing ({by(spacing)} mm)")
    if abs(np.linalg.det(image.affine[:3, :3] / spacing)) < 1e-3:
        raise Unusable("singular affine: its axes do not span three dimensions")
    return _grid(shape, spacing, image.affine)


def _grid(shape: Sequence[int], spacing: np.ndarray, affine: np.ndarray) -> dict:
    return {
        "shape": [int(n) for n in shape[:3]],
        "spacing": [float(s) for s in spacing],
        "orientation": "".join(axis or "?" for axis in nib.aff2axcodes(affine)),
        "affine": affine.tolist(),
    }


def _read_nifti(files: list[Path], min_size: int) -> tuple[dict, nib.Nifti1Pair, np.ndarray]:
    """The grid, the image and the voxels as they are stored; raises if they cannot be read to the file's end."""
    grid, path = check_header(files, min_size), files[0]
    image = nib.load(path)
    if path.suffix.lower() != ".gz":
        return grid, image, image.dataobj.get_unscaled()
    with gzip.open(path, "rb") as file:
        # Reading through our own stream, and on to its end, also verifies gzip's check sum.
        image = type(image).from_stream(file)
        voxels = image.dataobj.get_unscaled()
        while file.read(1 << 20):
            pass
    return grid, image, voxels


def check_dicom(files: list[Path], min_size: int) -> dict:
    """Reads a DICOM series as training will; returns its shape, spacing, orientation and the order of its files."""
    voxels, affine, order = read_dicom(files, min_size)
    low, high = _value_range(voxels)
    if low == high:
        raise Unusable("all voxels have the same value")
    return _grid(voxels.shape, nib.affines.voxel_sizes(affine), affine) | {"order": order}


def _value_range(voxels: np.ndarray) -> tuple[float, float]:
    """Least and greatest voxel; raises `Unusable` for NaN and Inf, which pass through min and max."""
    low, high = voxels.min(), voxels.max()
    with np.errstate(over="ignore"):  # what float32 cannot hold counts as infinite
        if not np.isfinite(np.array([low, high]).astype(np.float32)).all():
            broken = np.count_nonzero(~np.isfinite(voxels.astype(np.float32)))
            raise Unusable(f"{broken} voxels are NaN or infinite")
    return float(low), float(high)


class Cache:
    """Results of earlier runs in a JSON file, by path, size, time and what was asked. Only usable results are kept."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.old, self.new, self.saved = file, {}, {}, time.monotonic()
        try:
            stored = json.loads(file.read_text()) if file and file.exists() else {}
            self.old = stored if isinstance(stored, dict) else {}
        except (OSError, ValueError):
            logger.warning(f"The cache {file} is corrupt and is ignored: every scan is read again.")

    def get(self, function: Callable[..., dict], files: list[Path], *args) -> dict:
        """`function(files, *args)`, from the cache if no file has changed."""
        key = digest([function.__name__, CHECK_VERSION, stats(files), args])
        result = self.old.get(key)
        self.new[key] = result if isinstance(result, dict) else function(files, *args)
        return self.new[key]

    def save(self, every: float = 0.0) -> None:
        """Writes the file, if the last time is more than `every` seconds ago."""
        if self.file and time.monotonic() - self.saved >= every:
            write_atomically(self.file, json.dumps(self.new.copy()))
            self.saved = time.monotonic()


def in_threads(function: Callable, things: Sequence, num_workers: int, cache: Cache, description: str) -> list:
    """`[function(thing) for thing in things]` in threads, with progress on stderr; keeps the cache when stopped."""
    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        results = []
        for result in tqdm(pool.map(function, things), description, len(things), disable=None if things else True):
            results.append(result)
            cache.save(every=30)
        return results
    finally:
        pool.shutdown(cancel_futures=True)
        cache.save()
