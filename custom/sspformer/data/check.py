"""Whether a scan and its label map can be used: each file is read once, to its end."""

from __future__ import annotations

import gzip
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm.contrib.concurrent import thread_map

from ..io.dicom_in import read_dicom
from ..io.errors import Unusable, by, check_size, reason_of, without_ones
from .cache import CheckCache
from .labels import integer_ranges
from .options import MIN_SIZE, DatasetOptions
from .scan import Scan

__all__ = ["check_dicom", "check_header", "check_label", "check_nifti", "check_scans"]

MAX_SHIFT = 0.1  # of the grids of an image and its label map against each other, in voxels
NIFTI_VECTOR_INTENTS = {1005: "symmetric matrices", 1006: "a displacement field", 1007: "vectors", 2003: "colours"}


def check_scans(scans: Sequence[Scan], classes: set[int] | None, options: DatasetOptions, cache: CheckCache) -> None:
    """Reads all scans, and gives each its "check" or the "reason" why it is unusable.

    Args:
        scans: those with a reason are not read.
        classes: values that label maps may hold; None: any.
        options: see `DatasetOptions`.
        cache: of the results.
    """

    def check(scan: Scan) -> None:
        if not scan.reason:
            scan.reason = "; ".join([*_check_image(scan, options, cache), *_check_label_map(scan, classes, cache)])

    if scans:
        thread_map(check, scans, max_workers=options.num_workers, desc="checking scans", disable=None)


def _check_image(scan: Scan, options: DatasetOptions, cache: CheckCache) -> Iterator[str]:
    """Keeps in the scan what its files hold, and says what is wrong with them."""
    try:
        scan.check = dict(cache.get(check_dicom if scan.series else check_nifti, scan.files, options.min_size))
    except Exception as error:
        yield reason_of(error)
        return
    if order := scan.check.get("order"):
        scan.files = [scan.files[i] for i in order]
    if volumes := scan.check.get("volumes"):
        if scan.label_map:
            yield f"4D ({len(volumes)} volumes), and a label map belongs to one volume"
        chosen = np.linspace(0, len(volumes) - 1, min(options.max_volumes, len(volumes))).round().astype(int)
        scan.volumes = [volumes[i] for i in chosen]


def _check_label_map(scan: Scan, classes: set[int] | None, cache: CheckCache) -> Iterator[str]:
    """Keeps in the scan what its label map holds, and says what is wrong with it."""
    if not scan.label_map:
        return
    label = f"its label map {scan.label_path}"
    if not os.path.lexists(scan.label_map):
        yield f"{label} is missing"
        return
    try:
        found = cache.get(check_label, scan.label_files)
    except Exception as error:
        yield f"{label}: {reason_of(error)}"
        return
    scan.check["values"] = values = {int(value): count for value, count in found["values"].items()}
    if "shape" in scan.check:
        yield from (f"{label} {problem}" for problem in _misfits(scan.check, found))
    if classes is not None and (unknown := set(values) - classes):
        hint = f"the classes are {integer_ranges(classes)}; others need --class_names and --network_def#out_channels"
        yield f"{label} has unknown values {integer_ranges(unknown)} ({hint})"
    if set(values) == {0}:
        scan.note = "empty label map"


def _misfits(image: dict, label: dict) -> Iterator[str]:
    """How the grid of a label map differs from that of its image."""
    if image["shape"] != label["shape"]:
        yield f"has another shape: {by(label['shape'])}, the image {by(image['shape'])}"
        return
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in image["shape"]))])
    shift = np.linalg.norm(corners @ np.subtract(image["affine"], label["affine"])[:3].T, axis=1).max()
    if shift > MAX_SHIFT * min(image["spacing"]):
        axes = image["orientation"], label["orientation"]
        turned = f", and its axes are {axes[1]}, the image's {axes[0]}" if axes[0] != axes[1] else ""
        yield f"has another affine: it lies up to {shift:.3g} mm off the image{turned}"


def check_nifti(files: list[Path], min_size: int) -> dict:
    """Reads a NIfTI file to its last byte; returns its grid (see `check_grid`) and, if 4D, its usable volumes."""
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
    """Reads a label map to its last byte; returns its grid (see `check_grid`) and how often each value occurs.

    Raises:
        Unusable: when it is no NIfTI file of one volume, or has a value that is not an integer.
    """
    grid, image, voxels = _read_nifti(files, MIN_SIZE)
    if len(shape := without_ones(image.shape)) > 3:
        raise Unusable(f"4D (shape {by(shape)}): a label map is one volume of class numbers")
    values, counts = np.unique(voxels, return_counts=True)
    slope = float(image.dataobj.slope)
    values = values * slope + float(image.dataobj.inter)
    stored_whole = np.issubdtype(image.get_data_dtype(), np.integer)  # scaled: precise to half a step
    tolerance = max(1e-4, min(0.1, 0.51 * abs(slope))) if stored_whole else 1e-4
    whole = np.isfinite(values) & (np.abs(values - np.round(values)) < tolerance)
    if not whole.all():
        examples = ", ".join(f"{value:.7g}" for value in values[~whole][:3])
        raise Unusable(f"its values are not integers (such as {examples}), so it is not a map of class numbers")
    return grid | {"values": {str(int(v)): int(n) for v, n in zip(np.round(values), counts, strict=True)}}


def check_header(files: list[Path], min_size: int) -> dict:
    """The grid of a NIfTI file by its header (see `check_grid`); no voxel is read.

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
        raw_header = image.header_class.from_fileobj(file, check=False)  # nibabel's check would replace zero spacing

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
    return check_grid(shape, spacing, image.affine)


def check_grid(shape: Sequence[int], spacing: np.ndarray, affine: np.ndarray) -> dict:
    """The grid of a scan, whatever its format: shape, spacing in mm, orientation and affine to RAS mm.

    Raises:
        Unusable: when its geometry cannot be.
    """
    if not np.isfinite(affine).all() or not np.isfinite(spacing).all() or min(spacing) <= 0:
        raise Unusable(f"zero or non-finite voxel spacing ({by(spacing)} mm)")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise Unusable("singular affine: its axes do not span three dimensions")
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
    """Reads a DICOM series as training will; returns its grid (see `check_grid`) and the order of its files."""
    voxels, affine, order = read_dicom(files, min_size)
    low, high = _value_range(voxels)
    if low == high:
        raise Unusable("all voxels have the same value")
    return check_grid(voxels.shape, nib.affines.voxel_sizes(affine), affine) | {"order": order}


def _value_range(voxels: np.ndarray) -> tuple[float, float]:
    """Least and greatest voxel; raises `Unusable` for NaN and Inf, which pass through min and max."""
    low, high = voxels.min(), voxels.max()
    with np.errstate(over="ignore"):  # what float32 cannot hold counts as infinite
        if not np.isfinite(np.array([low, high]).astype(np.float32)).all():
            broken = np.count_nonzero(~np.isfinite(voxels.astype(np.float32)))
            raise Unusable(f"{broken} voxels are NaN or infinite")
    return float(low), float(high)
